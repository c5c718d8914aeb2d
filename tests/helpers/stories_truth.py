"""What holds at every word of a story,
found again from the words alone (the generator's records are not looked at)."""

from codebook_tutorial.world.grammar import GIRLS, MARKS, NAMES, SENTENCE_KINDS
from codebook_tutorial.world.words import CLASSES

AGREEMENT, CLASS = (
    SENTENCE_KINDS.index("agreement"),
    {w: kind for kind, words in CLASSES.items() for w in words},
)


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


def truth(s):
    "Family -> the value at every word, None where none holds."
    words, split, out = s.words, sentences(s.words), {}

    def put(name, i, value):
        out.setdefault(name, [None] * len(words))[i] = value

    for name in (
        "after_apostrophe",
        "gift_part",
        "gift_form",
        "hero_gender",
        "subject_number",
        "parenthesis_ahead",
        "tone_ahead",
        "next_role",
        "will_do",
        "negated",
        "repeated",
        "previous_class",
        "words_left",
        "last_sentence",
    ):
        put(name, 0, None)
    hero, seen, names, negated = (
        None if s.document == "gift" else hero_of([words[i] for i in split[0]], s.document),
        set(),
        set(),
        False,
    )
    for k, positions in enumerate(split):
        ws = [words[i] for i in positions]
        role, form = parts(ws, k, len(split) - 1, document=s.document, hero=hero)
        told = sorted(j for j in role)
        for j, i in enumerate(positions):
            w, before = words[i], words[i - 1] if i else None
            put("sentence_number", i, ["first", "second", "third", "later"][min(k, 3)])
            put("word_number", i, ["first", "second", "third"][j] if j < 3 else None)
            put(
                "previous_class",
                i,
                None if before is None or CLASS[before] == "apostrophe" else CLASS[before],
            )
            put("after_apostrophe", i, "yes" if before in ("'s", "n't", "'m", "'re") else None)
            negated = (negated or w in ("n't", "not", "never", "No", "Nobody")) and w not in MARKS
            put("negated", i, "yes" if negated else None)
            put("name_role", i, role.get(j))
            if i:
                put("next_role", i - 1, role.get(j))
            if form:
                so_far = sum(t <= j for t in told)
                put(
                    "gift_part",
                    i,
                    "giver again" if so_far >= 3 else "two named" if so_far == 2 else None,
                )
                put("gift_form", i, form if so_far >= 3 else None)
                put(
                    "will_do",
                    i,
                    None
                    if role.get(j) not in ("first of two", "second of two")
                    else "receiver"
                    if (role[j] == "first of two") == (form == "ABBA")
                    else "giver",
                )
            if w in NAMES:
                names.add(w)
            put(
                "people",
                i,
                ["one", "two", "three or more"][min(len(names), 3) - 1] if names else None,
            )
            put(
                "repeated",
                i,
                "yes" if w in seen and CLASS[w] in ("name", "noun", "plural") else None,
            )
            seen.add(w)
            if hero in names:
                put("hero_gender", i, "girl" if hero in GIRLS else "boy")
            left = len(positions) - 1 - j
            put("words_left", i, {2: "two", 3: "three", 4: "four"}.get(left))
            put("last_sentence", i, "yes" if k == len(split) - 1 else None)
            put("parenthesis_ahead", i, "yes" if "(" in ws[j + 1 :] else None)
            put("tone_ahead", i, "?" if "?" in ws[j + 1 :] else "!" if "!" in ws[j + 1 :] else None)
        agrees = next((j for j, w in enumerate(ws) if w in ("was", "were", "has", "have")), None)
        if s.kinds[positions[0]] == AGREEMENT:
            noun = next(j for j, w in enumerate(ws) if CLASS[w] in ("noun", "plural"))
            assert (ws[agrees] in ("was", "has")) == (CLASS[ws[noun]] == "noun")
            for j in range(noun, agrees):
                put(
                    "subject_number",
                    positions[j],
                    {"noun": "singular", "plural": "plural"}[CLASS[ws[noun]]],
                )
    return out
