"""What holds at every word of a story,
found again from the words alone (the generator's records are not looked at)."""

from codebook_tutorial.world.grammar import GIRLS, MARKS, NAMES, SENTENCE_KINDS
from codebook_tutorial.world.words import CLASSES

AGREEMENT = SENTENCE_KINDS.index("agreement")
CLASS = {w: kind for kind, words in CLASSES.items() for w in words}


def sentences(words):
    "Positions of each sentence; a sentence ends at its full stop."
    out, current = [], []
    for i, w in enumerate(words):
        current.append(i)
        if w == ".":
            out.append(current)
            current = []
    return out


def parts(words, k, last, *, document, hero):
    "Word number -> the part its name plays, and the form (ABBA, BABA, None), of sentence k."
    named = [(j, w) for j, w in enumerate(words) if w in NAMES]
    if len(named) == 4 and words[0] != "“" and "(" not in words:
        giver = named[2][1]
        return (
            {
                j: "first of two"
                if q == 0
                else "second of two"
                if q == 1
                else "giver again"
                if w == giver
                else "receiver again"
                for q, (j, w) in enumerate(named)
            },
            "BABA" if named[0][1] == giver else "ABBA",
        )
    if words[0] == "“" and not (document == "talk" and k in (0, last)):
        closing = words.index("”")
        return {
            j: "speaker" if j > closing and words[j - 1] != "told" else "addressee"
            for j, _ in named
        }, None
    return {j: "hero" if w == hero else "friend" for j, w in named}, None


def hero_of(words, document):
    "The hero: named first in a story; in a talk the one who greets."
    named = [w for w in words if w in NAMES]
    return named[0] if document == "story" or words[0] != "“" else named[1]


FAMILIES = (
    "after_apostrophe gift_part gift_form hero_gender subject_number parenthesis_ahead tone_ahead "
    "next_role will_do negated repeated previous_class words_left last_sentence"
).split()


class Told:
    "The values found so far, and what is known while a story is read word by word."

    def __init__(self, s):
        self.words, self.split = s.words, sentences(s.words)
        self.out = {name: [None] * len(s.words) for name in FAMILIES}
        self.document = s.document
        first = [self.words[i] for i in self.split[0]]
        self.hero = None if s.document == "gift" else hero_of(first, s.document)
        self.seen, self.names, self.negated = set(), set(), False

    def put(self, name, i, value):
        self.out.setdefault(name, [None] * len(self.words))[i] = value

    def sentence(self, k):
        "All of sentence k, word by word."
        positions = self.split[k]
        ws = [self.words[i] for i in positions]
        role, form = parts(ws, k, len(self.split) - 1, document=self.document, hero=self.hero)
        for j, i in enumerate(positions):
            self.put("sentence_number", i, ["first", "second", "third", "later"][min(k, 3)])
            self.put("last_sentence", i, "yes" if k == len(self.split) - 1 else None)
            self.place(i, j, ws)
            self.before(i)
            self.put("name_role", i, role.get(j))
            if i:
                self.put("next_role", i - 1, role.get(j))
            if form:
                self.gift(i, j, role, form=form)
            self.known(i)

    def place(self, i, j, ws):
        "Where the word stands in its sentence, and what comes in it."
        self.put("word_number", i, ["first", "second", "third"][j] if j < 3 else None)
        left = {2: "two", 3: "three", 4: "four"}
        self.put("words_left", i, left.get(len(ws) - 1 - j))
        ahead = ws[j + 1 :]
        self.put("parenthesis_ahead", i, "yes" if "(" in ahead else None)
        self.put("tone_ahead", i, "?" if "?" in ahead else "!" if "!" in ahead else None)

    def before(self, i):
        "What the word before was, and whether a negation still holds."
        w, before = self.words[i], self.words[i - 1] if i else None
        kind = None if before is None or CLASS[before] == "apostrophe" else CLASS[before]
        self.put("previous_class", i, kind)
        self.put("after_apostrophe", i, "yes" if before in ("'s", "n't", "'m", "'re") else None)
        self.negated |= w in ("n't", "not", "never", "No", "Nobody")
        self.negated &= w not in MARKS
        self.put("negated", i, "yes" if self.negated else None)

    def gift(self, i, j, role, *, form):
        "Who has been named of the two, and who will do something."
        so_far = sum(t <= j for t in role)
        part = "giver again" if so_far >= 3 else "two named" if so_far == 2 else None
        self.put("gift_part", i, part)
        self.put("gift_form", i, form if so_far >= 3 else None)
        will = None
        if role.get(j) in ("first of two", "second of two"):
            first = role[j] == "first of two"
            will = "receiver" if first == (form == "ABBA") else "giver"
        self.put("will_do", i, will)

    def known(self, i):
        "People and things met so far."
        w = self.words[i]
        if w in NAMES:
            self.names.add(w)
        n = len(self.names)
        self.put("people", i, ["one", "two", "three or more"][min(n, 3) - 1] if n else None)
        again = w in self.seen and CLASS[w] in ("name", "noun", "plural")
        self.put("repeated", i, "yes" if again else None)
        self.seen.add(w)
        if self.hero in self.names:
            self.put("hero_gender", i, "girl" if self.hero in GIRLS else "boy")

    def agreement(self, k):
        "The subject's number, from the noun up to the verb that agrees with it."
        ws = [self.words[i] for i in self.split[k]]
        agrees = next(j for j, w in enumerate(ws) if w in ("was", "were", "has", "have"))
        noun = next(j for j, w in enumerate(ws) if CLASS[w] in ("noun", "plural"))
        number = "singular" if CLASS[ws[noun]] == "noun" else "plural"
        assert (ws[agrees] in ("was", "has")) == (number == "singular")
        for j in range(noun, agrees):
            self.put("subject_number", self.split[k][j], number)


def truth(s):
    "Family -> the value at every word, None where none holds."
    told = Told(s)
    for k, positions in enumerate(told.split):
        told.sentence(k)
        if s.kinds[positions[0]] == AGREEMENT:
            told.agreement(k)
    return told.out
