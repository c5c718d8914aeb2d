"""The probability of a document, found from its words and the grammar file alone:
the sum over all ways to make it. Nothing of the generator is used."""

import math
import tomllib
from functools import lru_cache

from codebook_tutorial.core import data_path

G = tomllib.loads(data_path("stories/grammar.toml").read_text(encoding="utf-8"))
LISTS = {k: v.split() for part in ("facts", "words") for k, v in G[part].items()}
GIRLS, BOYS = (G["names"][k].split() for k in ("girls", "boys"))
NAMES = {n: i for i, n in enumerate(GIRLS + BOYS)}
WEIGHT = [1 / (i + 31) for names in (GIRLS, BOYS) for i in range(len(names))]
GROUPS = {
    fact: (G[group], list(G[group]))
    for fact, group in (("topic", "topics"), ("mood", "moods"), ("weather", "weathers"))
}
THINGS = min(len(t["noun"].split()) for t in G["topics"].values())
SHORT = dict(noun="topic_noun", nouns="topic_plural", verb="topic_verb", spot="topic_place")
PRONOUNS = dict(
    she=("she", "he"),
    She=("She", "He"),
    her=("her", "his"),
    Her=("Her", "His"),
    him=("her", "him"),
    girl=("girl", "boy"),
)


def plural(n):
    return (
        n[:-1] + "ies"
        if n.endswith("y") and n[-2] not in "aeiou"
        else n + ("es" if n.endswith(("s", "x", "ch", "sh")) else "s")
    )


@lru_cache
def zipf(n):
    return [1 / (i + 6) / sum(1 / (j + 6) for j in range(n)) for i in range(n)]


def p_fact(name, i):
    "Probability that a fact takes its i-th value."
    if name in GROUPS:
        return 1 / len(GROUPS[name][1])
    if name == "month":
        return 1 / 12
    if name == "number":
        return 1 / 8 if i < 8 else 0
    if name == "thing":
        return zipf(THINGS)[i] if i < THINGS else 0
    if name == "hero":
        return WEIGHT[i] / sum(WEIGHT)
    return zipf(len(LISTS[name]))[i]


@lru_cache(None)
def p_partner(a, b, pairs):
    "Probability of a second name beside the first."

    def meet(i):
        return i != a and ((a + i) % 10 == 0) == (pairs == "held_out")

    return WEIGHT[b] / sum(w for i, w in enumerate(WEIGHT) if meet(i)) if meet(b) else 0


def with_fact(known, name, values):
    "Ways to go on when a fact must have one of some values: [(known, probability)]."
    if name in known:
        return [(known, 1.0)] if known[name] in values else []
    return [({**known, name: i}, p_fact(name, i)) for i in values if p_fact(name, i)]


def person(known, who, word, *, pairs):
    "Ways in which a word names the hero or the friend."
    if word not in NAMES:
        return []
    if who == "hero":
        return with_fact(known, "hero", [NAMES[word]])
    if "friend" in known:
        return [(known, 1.0)] if known["friend"] == NAMES[word] else []
    heroes = [known["hero"]] if "hero" in known else range(len(NAMES))
    ways = [
        (
            {**known, "hero": h, "friend": NAMES[word]},
            (1.0 if "hero" in known else p_fact("hero", h)) * p_partner(h, NAMES[word], pairs),
        )
        for h in heroes
    ]
    return [(k, p) for k, p in ways if p]


def from_group(slot, word, known):
    "Ways for a word of a topic, a mood or the weather."
    fact, part = slot.split("_")
    for v, value in enumerate(GROUPS[fact][1]):
        words = (
            [plural(w) for w in G["topics"][value]["noun"].split()]
            if part == "plural"
            else GROUPS[fact][0][value][part].split()
        )
        if word in words:
            for k, p in with_fact(known, fact, [v]):
                yield k, p * zipf(len(words))[words.index(word)]


def thing(slot, word, known):
    "Ways for the story's own thing."
    for t, topic in enumerate(GROUPS["topic"][1]):
        for i, noun in enumerate(G["topics"][topic]["noun"].split()):
            if word == (noun if slot == "thing" else plural(noun)):
                for k, p in with_fact(known, "topic", [t]):
                    for k2, q in with_fact(k, "thing", [i]):
                        yield k2, p * q


def other_mood(word, known):
    "Ways for a mood that is not the story's."
    moods = GROUPS["mood"][1]
    for m, mood in enumerate(moods):
        words = G["moods"][mood]["adj"].split()
        for own in [known["mood"]] if "mood" in known else range(len(moods)):
            if word in words and own != m:
                yield (
                    {**known, "mood": own},
                    (1.0 if "mood" in known else 1 / len(moods))
                    * zipf(len(words))[words.index(word)]
                    / (len(moods) - 1),
                )


def slot_ways(slot, word, known, *, pairs, swap, form):
    "All ways in which a slot gives a word: [(known, probability)]."
    slot = SHORT.get(slot, slot)
    if slot in list("ABPQXYSI"):
        hero = dict(A=True, B=False, P=not swap, Q=swap, S=not swap, I=swap)
        hero |= {"X": hero["S" if form else "I"], "Y": hero["I" if form else "S"]}
        return person(known, "hero" if hero[slot] else "friend", word, pairs=pairs)
    if slot.rstrip("2") in PRONOUNS:
        who = "friend" if slot.endswith("2") else "hero"
        return (
            [(known, 1.0)] if PRONOUNS[slot.rstrip("2")][known[who] >= len(GIRLS)] == word else []
        )
    if slot in ("thing", "things"):
        return list(thing(slot, word, known))
    if slot == "other_mood":
        return list(other_mood(word, known))
    if slot == "greater":
        i, count = (
            LISTS["number"].index(word) if word in LISTS["number"] else -1,
            len(LISTS["number"]),
        )
        return [
            ({**known, "number": n}, (1.0 if "number" in known else 1 / 8) / (count - n - 1))
            for n in ([known["number"]] if "number" in known else range(8))
            if i > n
        ]
    if slot.split("_")[0] in GROUPS:
        return list(from_group(slot, word, known))
    words = LISTS[slot.removeprefix("any_")]
    if word not in words:
        return []
    return (
        with_fact(known, slot, [words.index(word)])
        if slot in G["facts"]
        else [(known, zipf(len(words))[words.index(word)])]
    )


@lru_cache(None)
def lines(kind):
    "The lines of a kind with phrases filled in, and their probabilities."
    out, raw = [], [line.split() for line in G["sentences"][kind].strip().splitlines()]
    for line in raw:
        ways = [([], 1 / len(raw))]
        for w in line:
            phrases = (
                [p.split() for p in G["phrases"][w[1:-1]].strip().splitlines()]
                if w[1:-1] in G["phrases"]
                else [[w]]
            )
            ways = [(words + phrase, p / len(phrases)) for words, p in ways for phrase in phrases]
        out += ways
    return out


def sentence_ways(kind, words, known, *, pairs):
    "All ways to tell one sentence."
    for line, p_line in lines(kind):
        if len(line) != len(words) or not all(
            x[0] == "{" or x == w or x in ("a", "A") and w == x + "n" for x, w in zip(line, words)
        ):
            continue
        for swap, p_swap in (
            [(False, 0.5), (True, 0.5)] if known and kind in ("gift", "talk") else [(False, 1.0)]
        ):
            for form, p_form in [(0, 0.5), (1, 0.5)] if kind == "gift" else [(None, 1.0)]:
                ways = [(known, p_line * p_swap * p_form)]
                named = next(
                    (NAMES[w] for x, w in zip(line, words) if x == "{A}" and w in NAMES), None
                )
                if (
                    "hero" not in known and kind != "gift" and named is not None
                ):  # `girl` may come before the name
                    ways = [({**known, "hero": named}, ways[0][1] * p_fact("hero", named))]
                for x, w in zip(line, words):
                    if x[0] == "{":
                        ways = [
                            (k2, p * q)
                            for k, p in ways
                            for k2, q in slot_ways(x[1:-1], w, k, pairs=pairs, swap=swap, form=form)
                        ]
                yield from ways


def merged(ways):
    "Equal states put together."
    out = {}
    for known, p in ways:
        out[tuple(sorted(known.items()))] = out.get(tuple(sorted(known.items())), 0) + p
    return [(dict(k), p) for k, p in out.items()]


def surprise(words, pairs="train"):
    "-log of the probability of a document."
    split, total = " ".join(words).split(" ."), 0.0
    told = [s.split() + ["."] for s in split if s.strip()]
    for name, d in G["documents"].items():
        first, last = d["first"].split(), d["last"].split()
        middle = len(told) - len(first) - len(last)
        if not d["length"][0] <= middle <= d["length"][1]:
            continue
        share = d["share"] / sum(x["share"] for x in G["documents"].values())
        ways = [({}, share / (d["length"][1] - d["length"][0] + 1))]
        weights = sum(d["middle"].values())
        plan = (
            [[(k, 1.0)] for k in first]
            + [[(k, w / weights) for k, w in d["middle"].items()]] * middle
            + [[(k, 1.0)] for k in last]
        )
        for sentence, kinds in zip(told, plan):
            if name == "gift":
                ways = merged([({}, p) for _, p in ways])  # new people every time
            ways = merged(
                [
                    (k2, p * p_kind * q)
                    for known, p in ways
                    for kind, p_kind in kinds
                    for k2, q in sentence_ways(kind, sentence, known, pairs=pairs)
                ]
            )
        total += sum(p for _, p in ways)
    return -math.log(total)
