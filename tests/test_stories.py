"""The language: its choices are what the words show, its record is true at every word,
and nobody is told what is still to come."""

import dataclasses
import hashlib
import math
import re
from itertools import combinations, islice, product

import numpy as np
import pytest
import torch
from helpers import stories_parser
from helpers.stories_truth import truth

from codebook_tutorial.core import data_path
from codebook_tutorial.model.run import next_probs
from codebook_tutorial.model.text import fill_rows, load_text
from codebook_tutorial.world.concepts import ATOMS, CONCEPTS, atoms, concept_table, story_text
from codebook_tutorial.world.grammar import (
    GIRLS,
    GRAMMAR,
    ID,
    LISTS,
    NAMES,
    PRONOUNS,
    SENTENCE_KINDS,
    TOPICS,
    VOCABULARY,
    detokenize,
    flat,
    plural,
)
from codebook_tutorial.world.prompts import gift_prompts, needs_stories, prompts, role
from codebook_tutorial.world.questions import QUESTIONS, ask, exchanged, recalls, score, shuffled
from codebook_tutorial.world.slots import FACTS, Choice, held_out, uniform
from codebook_tutorial.world.stories import ROLES, Teller, make_tokenizer, stories
from codebook_tutorial.world.words import WORD_TABLES

SOME = list(islice(stories(seed=11), 1500))


# ---------------------------------------------------------------- words
def test_there_are_enough_of_everything():
    assert (
        len(NAMES) >= 200
        and len(set(NAMES)) == len(NAMES)
        and len(TOPICS) >= 8
        and len(VOCABULARY) == len(set(VOCABULARY)) > 2000
    )
    assert (
        len(CONCEPTS) >= 50
        and {c.kind for c in CONCEPTS.values()} == {"token", "context", "future"}
        and len(set(ATOMS)) == len(ATOMS) > 500
    )


def test_a_topics_words_are_its_own():
    owners = {}
    for name, words in LISTS.items():
        for value, some in words.items() if isinstance(words, dict) else [("", words)]:
            for w in some:
                owners.setdefault(w, set()).add((name, value))
    literal = {
        w
        for part in ("sentences", "phrases")
        for lines in GRAMMAR[part].values()
        for line in lines
        for w in line
        if w[0] != "{"
    }
    topical = {w for w, at in owners.items() if any(name.startswith("topic") for name, _ in at)}
    assert (
        not [w for w in topical if len(owners[w]) > 1]
        and not topical & literal
        and not set(owners) & set(NAMES)
    )
    for table in (
        "month_word",
        "mood_word",
        "weather_word",
        "colour_word",
        "number_word",
    ):  # nor does the frame of a sentence tell a fact
        assert not [
            w
            for w in literal
            if WORD_TABLES[table][ID[w]] >= 0 and not (table, w) == ("weather_word", "fell")
        ], table


def test_every_word_has_a_class():
    assert [w for w, c in zip(VOCABULARY, WORD_TABLES["word_class"]) if c < 0] == [
        "<pad>",
        "<bos>",
        "<unk>",
    ]


@pytest.mark.parametrize(
    "noun,many",
    [
        ("dragon", "dragons"),
        ("pony", "ponies"),
        ("donkey", "donkeys"),
        ("match", "matches"),
        ("compass", "compasses"),
        ("fish", "fishes"),
    ],
)
def test_plurals(noun, many):
    assert plural(noun) == many


# ---------------------------------------------------------------- choices and their surprise
@pytest.mark.parametrize(
    "choice",
    [
        Choice(7),
        Choice(40, offset=30),
        Choice(weights=[3.0, 0.0, 1.0]),
        uniform(5),
        *FACTS.values(),
    ],
)
def test_surprises_are_those_of_the_draws(choice):
    p = np.exp(-np.array(choice.nats))
    assert p.sum() == pytest.approx(1) and choice.cum[-1] == pytest.approx(1)
    teller = Teller(5)
    teller.nats = 0.0
    drawn = np.bincount([teller.pick(choice) for _ in range(20_000)], minlength=len(p)) / 20_000
    assert np.abs(drawn - p).max() < 5 * math.sqrt(0.25 / 20_000) and not drawn[p == 0].any()


def words_of(slot):
    "All words that a slot can give."
    short = dict(
        noun="topic_noun",
        nouns="topic_plural",
        verb="topic_verb",
        spot="topic_place",
        thing="topic_noun",
        things="topic_plural",
        greater="number",
        any_number="number",
        any_place="place",
        any_object="object",
        other_mood="mood_adj",
    )
    if slot in "ABPQXYSI":
        return set(NAMES)
    if slot.rstrip("2") in PRONOUNS:
        return set(PRONOUNS[slot.rstrip("2")])
    return set(flat(LISTS[short.get(slot, slot)]))


def alternatives(line):
    "A line with its phrases filled in: lists of sets of words."

    def fixed(w):
        return words_of(w[1:-1]) if w[0] == "{" else {w, w + "n"} if w in ("a", "A") else {w}

    def ways(w):
        phrases = GRAMMAR["phrases"].get(w[1:-1], [[w]])
        return [[fixed(x) for x in phrase] for phrase in phrases]

    parts = [ways(w) for w in line]
    return [sum(some, []) for some in product(*parts)]


LINES = [
    (kind, " ".join(line), sets)
    for kind, lines in GRAMMAR["sentences"].items()
    for line in lines
    for sets in alternatives(line)
]


def test_no_two_lines_can_give_the_same_sentence():
    for (k1, l1, a), (k2, l2, b) in combinations(LINES, 2):
        assert len(a) != len(b) or not all(x & y for x, y in zip(a, b)), f"{k1}: {l1} | {k2}: {l2}"


def test_the_longest_document_has_room_in_a_row():
    longest = {
        kind: max(len(sets) for k, _, sets in LINES if k == kind) for kind in GRAMMAR["sentences"]
    }
    for d in GRAMMAR["documents"].values():
        most = (
            sum(longest[k] for k in d["first"])
            + d["length"][1] * max(longest[k] for k in d["middle"])
            + sum(longest[k] for k in d["last"])
        )
        assert most + 2 <= 256


@pytest.mark.parametrize("pairs,n", [("train", 150), ("held_out", 40)])
def test_surprise_is_that_of_the_text(pairs, n):
    """-log P(text), summed over all ways to make the text:
    no choice is hidden, so the entropy of the choices is that of the language."""
    some = list(islice(stories(77, "test", pairs), n))
    assert {s.document for s in some} == set(GRAMMAR["documents"])
    for s in some:
        assert s.nats.sum() == pytest.approx(stories_parser.surprise(s.words, pairs), abs=1e-9), (
            s.text
        )


# ---------------------------------------------------------------- documents
def test_streams_are_told_by_seed_split_and_pairs():
    def first(*a):
        return [s.text for s in islice(stories(*a), 20)]

    assert (
        first(3) == first(3)
        and len(
            {
                tuple(x)
                for x in (first(3), first(4), first(3, "test"), first(3, "train", "held_out"))
            }
        )
        == 4
    )
    assert not {s.text for s in islice(stories(0), 3000)} & {
        s.text for s in islice(stories(0, "test"), 3000) if len(s) > 40
    }


def test_the_language_is_the_one_the_model_was_trained_on():
    digest = hashlib.sha256(
        np.concatenate([s.ids for s in islice(stories(0), 2000)]).astype("<i4").tobytes()
    ).hexdigest()
    assert digest[:16] == DIGEST, (
        "the grammar or the teller changed: train the shipped model anew (data/make_stories.py), "
        "then change this"
    )


DIGEST = "a7fe88afe75e8303"


def test_held_out_pairs_never_share_a_sentence_and_the_others_do():
    for pairs, some in (
        ("train", SOME),
        ("held_out", list(islice(stories(0, "test", "held_out"), 500))),
    ):
        met = set()
        for s in some:
            for n in range(s.sentences[-1] + 1):
                names = {
                    NAMES.index(VOCABULARY[i]) for i in s.ids[(s.sentences == n) & (s.roles >= 0)]
                }
                met |= {tuple(sorted(names))} if len(names) == 2 else set()
        assert len(met) > 300 and {held_out(*p) for p in met} == {pairs == "held_out"}
    with pytest.raises(ValueError, match="expected pairs='train' or 'held_out', got 'all'"):
        next(stories(pairs="all"))


def test_articles_and_facts_agree():
    for s in SOME:
        text = s.text
        assert not re.search(
            r"\b[Aa] ([aeiou](?!nicycle)|honest|hourglass)", text
        ) and not re.search(r"\b[Aa]n (unicycle|(?!honest|hourglass)[^aeiou])", text)
        for fact in ("month", "colour", "relative", "pet"):
            if fact in s.facts:
                assert LISTS[fact][s.facts[fact]] in s.words
        assert (
            len({w for w in s.words if WORD_TABLES["month_word"][ID[w]] >= 0}) <= 1
            and len(set(WORD_TABLES["topic_word"][s.ids]) - {-1}) <= 1
        )
        if s.document == "story" and "hero" in s.facts:
            other = PRONOUNS["she"][NAMES[s.facts["hero"]] in GIRLS]
            assert other not in s.words


def test_all_forms_occur_equally():
    forms = np.concatenate([s.forms[s.roles == ROLES.index("receiver again")] for s in SOME])
    assert (
        len(forms) > 1000
        and abs(forms.mean() - 0.5) < 0.05
        and {s.document for s in SOME} == set(GRAMMAR["documents"])
        and {k for s in SOME for k in s.kinds} == set(range(len(SENTENCE_KINDS)))
    )


# ---------------------------------------------------------------- tokens
def test_tokens_are_words_and_decode_to_the_text(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    for tok in (
        make_tokenizer(),
        AutoTokenizer.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(data_path("stories")),
    ):
        assert tok.get_vocab() == ID and needs_stories(tok)
        for s in SOME[:300]:
            assert tok(s.text)["input_ids"] == s.ids.tolist() and tok.decode(s.ids) == s.text
        typed = tok("\"I can't see the dragon,\" said Anna (the doctor's friend).")
        assert (
            tok.convert_ids_to_tokens(typed["input_ids"])
            == "“ I ca n't see the dragon , ” said Anna ( the doctor 's friend ) .".split()
        )
        assert (
            tok("a zeppelin")["input_ids"] == [ID["a"], ID["<unk>"]]
            and tok.decode([ID["<bos>"], ID["a"]], skip_special_tokens=True) == "a"
        )


def test_detokenize():
    assert (
        detokenize("“ Do n't , ” said Tom 's cat ( a cat ) .".split())
        == "“Don't,” said Tom's cat (a cat)."
    )


def test_rows_hold_whole_documents_in_order():
    docs = [s.ids.tolist() for s in SOME[:200]]
    rows = list(fill_rows(docs, 256, 1, pad=0))
    assert {len(r) for r in rows} == {256} and all(r[0] == 1 for r in rows)
    assert [i for r in rows for i in r if i > 2] == sum(docs, [])
    ends = [j for r in rows for i, j in zip(r, r[1:]) if i > 2 and j <= 2]
    assert ends == [1] * 200  # each document whole, with a BOS behind it
    with pytest.raises(ValueError, match="document 1 has 30 tokens, a row of 20 has room for 18"):
        list(fill_rows([[5], [5] * 30], 20, 1, pad=0))


# ---------------------------------------------------------------- concepts
def beginning(s, n):
    "The first n words of a story, with their record."
    cut = {
        f.name: getattr(s, f.name)[:n]
        for f in dataclasses.fields(s)
        if isinstance(getattr(s, f.name), np.ndarray)
    }
    return dataclasses.replace(s, **cut)


@pytest.mark.parametrize("name", [n for n, c in CONCEPTS.items() if c.kind != "future"])
def test_what_holds_at_a_word_does_not_depend_on_what_follows(name):
    codes = CONCEPTS[name].codes
    for s in SOME[:60]:
        whole = codes(s)
        assert whole.shape == s.ids.shape
        for n in range(1, len(s), 7):
            assert (codes(beginning(s, n)) == whole[:n]).all(), s.text


def test_the_future_does():
    for name, c in CONCEPTS.items():
        if c.kind == "future" and name not in ("topic_ahead", "will_do"):
            assert any(
                (c.codes(beginning(s, n)) != c.codes(s)[:n]).any()
                for s in SOME[:200]
                for n in range(2, len(s), 3)
            ), name


def test_every_value_occurs_and_codes_are_in_range():
    table = np.concatenate([concept_table(s) for s in SOME + list(islice(stories(12), 3000))])
    for i, c in enumerate(CONCEPTS.values()):
        seen = set(table[:, i].tolist()) - {-1}
        assert seen == set(range(len(c.values))), (c.name, set(range(len(c.values))) - seen)
        assert c.about and len(set(c.values)) == len(c.values)


def test_families_are_what_the_words_say():
    "Against code that looks at the words alone."
    checked, some = set(), SOME[:600] + [s for s in islice(stories(55, "test", "held_out"), 100)]
    for s in some:
        for name, want in truth(s).items():
            c = CONCEPTS[name]
            assert [c.values[v] if v >= 0 else None for v in c.codes(s)] == want, (name, s.text)
            checked.add(name)
    assert len(checked) == 18


def test_families_that_repeat_the_record():
    for s in SOME[:200]:

        def values(name):
            return [CONCEPTS[name].values[v] if v >= 0 else None for v in CONCEPTS[name].codes(s)]

        assert values("document") == [s.document] * len(s) and values("sentence_kind") == [
            SENTENCE_KINDS[k] for k in s.kinds
        ]
        topics, told = values("story_topic"), values("topic_ahead")
        assert [a or b for a, b in zip(topics, told)] == [
            TOPICS[s.facts["topic"]] if "topic" in s.facts else None
        ] * len(s) and not any(a and b for a, b in zip(topics, told))
        for name, table in (
            ("topic", "topic_word"),
            ("mood", "mood_word"),
            ("weather", "weather_word"),
            ("rare", "rare_word"),
        ):
            assert [v == "yes" for v in values(f"next_{name}")][:-1] == [
                WORD_TABLES[table][i] >= 0 for i in s.ids[1:]
            ]


def test_no_two_single_concepts_are_the_same():
    single = atoms(
        torch.from_numpy(np.concatenate([concept_table(s) for s in SOME]))
    ).T.contiguous()
    seen = {}
    for name, column in zip(ATOMS, single):
        key = hashlib.sha256(column.numpy().tobytes()).digest()
        assert key not in seen, (name, seen[key])
        seen[key] = name


def test_marks_open_and_close():
    for s in SOME:
        for name, pair in (("in_parentheses", "()"), ("in_quotes", "“”")):
            inside, want = False, []
            for w in s.words:
                if w == pair[1]:
                    inside = False
                want.append(inside)
                if w == pair[0]:
                    inside = True
            assert ((CONCEPTS[name].codes(s) >= 0) == want).all()


def test_facts_hold_from_the_word_that_tells_them():
    for fact in (
        "topic",
        "month",
        "mood",
        "weather",
        "colour",
        "number",
        "place",
        "object",
        "relative",
    ):
        told = 0
        for s in SOME:
            codes = CONCEPTS[f"story_{fact}"].codes(s)
            if fact not in s.facts:
                assert (codes == -1).all()
                continue
            first = int(np.flatnonzero(codes >= 0)[0]) if (codes >= 0).any() else len(s)
            assert (codes[first:] == s.facts[fact]).all() and (codes[:first] == -1).all()
            if first < len(s):
                told += 1
                assert (
                    CONCEPTS[f"{fact}_word"].values[WORD_TABLES[f"{fact}_word"][s.ids[first]]]
                    == CONCEPTS[f"story_{fact}"].values[s.facts[fact]]
                )
        assert told > 100


def test_parts_of_the_sentence_about_giving():
    for s in (s for s in SOME if s.document == "gift"):
        for n in range(s.sentences[-1] + 1):
            here = s.sentences == n
            names, roles, form = (
                s.ids[here][s.roles[here] >= 0],
                [ROLES[r] for r in s.roles[here] if r >= 0],
                s.forms[here][0],
            )
            assert roles == (["giver", "receiver"] if form else ["receiver", "giver"]) + [
                "giver again",
                "receiver again",
            ]
            assert (
                (names[0] == names[3]) == (form == 0)
                and (names[1] == names[2]) == (form == 0)
                and len(set(names)) == 2
            )


def test_next_concepts_are_the_next_words():
    for s in SOME[:200]:
        for name in ("class", "mark", "pronoun", "be_verb"):
            table = WORD_TABLES[
                dict(
                    zip(
                        ("class", "mark", "pronoun", "be_verb"),
                        ("word_class", "mark", "pronoun_gender", "be_verb"),
                    )
                )[name]
            ]
            assert (CONCEPTS[f"next_{name}"].codes(s)[:-1] == table[s.ids[1:]]).all() and CONCEPTS[
                f"next_{name}"
            ].codes(s)[-1] == -1


def test_labels_lie_on_the_rows_that_load_text_gives():
    text, codes = story_text(20_000, seed=3, split="test")
    assert torch.equal(
        text.ids, load_text(make_tokenizer(), "stories", n_tokens=20_000, length=256, seed=3).ids
    ) and codes.shape == (*text.ids.shape, len(CONCEPTS))
    assert (codes[~text.mask] == -1).all()
    for i, (name, c) in enumerate(CONCEPTS.items()):
        if name in WORD_TABLES:
            assert torch.equal(
                codes[..., i].long(),
                torch.from_numpy(WORD_TABLES[name])[text.ids].where(text.mask, -1),
            ), name
    single = atoms(codes[:3])
    assert single.shape[-1] == len(ATOMS) and torch.equal(single.sum(-1), (codes[:3] >= 0).sum(-1))
    assert single[..., ATOMS.index("mark=.")].equal((text.ids[:3] == ID["."]))


# ---------------------------------------------------------------- questions
def test_prompts_end_before_the_answer():
    for q in gift_prompts(50):
        assert (
            VOCABULARY[q.ids[-1]] == "to"
            and q.answer in q.ids
            and q.answer != role(q, "giver")
            and held_out(*(NAMES.index(VOCABULARY[i]) for i in (q.answer, role(q, "giver"))))
        )
    asked = prompts(50, recalls("month"))
    assert all(
        q.answer in q.ids[: q.begin + 1] and q.ids[1:] == q.story.ids[: q.at].tolist()
        for q in asked
    )
    with pytest.raises(ValueError, match="only 0 such positions in 5000 documents, asked for 5"):
        prompts(5, lambda s: [])


def test_controls_take_away_what_they_should():
    asked = gift_prompts(50)
    for ids, q in zip(shuffled(asked), asked):
        assert sorted(ids) == sorted(q.ids) and ids[0] == q.ids[0] and ids[-1] == q.ids[-1]
    assert sum(ids != q.ids for ids, q in zip(shuffled(asked), asked)) > 45
    asked = prompts(50, recalls("topic"))
    for ids, q in zip(exchanged(asked), asked):
        own = q.story.ids[q.begin : q.at].tolist()
        assert (
            ids[len(ids) - len(own) :] == own
            and ids[1 : len(ids) - len(own)] != q.story.ids[: q.begin].tolist()
        )


@pytest.mark.parametrize("question", QUESTIONS)
def test_an_untrained_model_knows_nothing(question, blank):
    got = ask(blank, question, 40)
    family = QUESTIONS[question][1]
    chance = 1 / len(VOCABULARY) if family is None else 1 / (WORD_TABLES[family].max() + 1)
    assert (
        got["score"].shape == got["control"].shape == (40,)
        and got["score"].mean() < 3 * chance
        and abs((got["score"] - got["control"]).mean()) < chance
    )


@pytest.fixture(scope="module")
def blank():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPTNeoXForCausalLM(
            GPTNeoXConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=256,
            )
        ).eval()


def test_one_who_knows_scores_one():
    asked = prompts(30, recalls("month"))
    answers = torch.tensor([q.answer for q in asked])
    sure = torch.nn.functional.one_hot(answers, len(VOCABULARY)).float()
    assert score(sure, asked).tolist() == [1.0] * 30 == score(sure, asked, "month_word").tolist()
    half = (
        sure * 0.1
        + torch.nn.functional.one_hot(torch.full_like(answers, ID["the"]), len(VOCABULARY)) * 0.9
    )
    assert score(half, asked).tolist() == pytest.approx([0.1] * 30) and score(
        half, asked, "month_word"
    ).tolist() == pytest.approx([1.0] * 30)  # of the months' probability, all


def test_next_probs_is_the_models_own(blank):
    rows = [q.ids for q in prompts(20, recalls("topic"))] + [[1]]
    want = torch.stack([blank(torch.tensor([r])).logits[0, -1].softmax(-1) for r in rows])
    assert torch.allclose(next_probs(blank, rows, batch=8), want, atol=1e-6)


def test_unknown_questions_are_named(blank):
    with pytest.raises(ValueError, match="no question 'taste'; expected one of topic, month"):
        ask(blank, "taste")


def test_other_tokenizers_are_told_why(capsys):
    class Other:
        def get_vocab(self):
            return {"a": 0}

    assert not needs_stories(Other()) and "only the stories record" in capsys.readouterr().out
