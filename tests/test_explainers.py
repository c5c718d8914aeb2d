"""Explainers that are language models:
the local one against plain passes, the one behind an address against a real HTTP server with
faults."""

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import transformers

from codebook_tutorial.feature.explain import answers, wire
from codebook_tutorial.feature.explain import local as explainers
from codebook_tutorial.feature.explain import protocol as autointerp
from codebook_tutorial.feature.explain.api import APIExplainer
from codebook_tutorial.feature.explain.local import LocalLMExplainer
from codebook_tutorial.feature.explain.prompts import (
    SHOTS,
    clean_phrase,
    escape_token,
    explain_messages,
    judge_messages,
    simulate_messages,
    token_lines,
)
from codebook_tutorial.feature.explain.protocol import Fragment

torch.set_num_threads(1)
KEY = "sk-test-0123456789abcdefSECRET"
TOKENS = ["The", " cat", "\n", " sat\t", " 10", ".", "naïve €", "\\"]
FEATURE = [Fragment(["a", " storm", " came", " in", " the", " night"], [0, 10, 0, 0, 0, 0])]


# ---- prompts
def test_a_line_stays_a_line():
    tokens = ["\t", "\n", "\\t", "\\", "\r\n", " ", "\x0b\u2028", "t"]
    lines = token_lines(tokens, range(8)).split("\n")
    assert (
        len(lines) == 8
        and all(line.count("\t") == 1 for line in lines)
        and len({line.split("\t")[0] for line in lines}) == 8
    )
    with pytest.raises(ValueError):
        token_lines(["a", "b"], [1])


@pytest.mark.parametrize(
    "fires, of, again", [(1, 5, False), (1, 6, True), (0, 6, True), (5, 5, False)]
)
def test_the_numbers_above_0_once_more_where_they_are_few(fires, of, again):
    tokens = [f"w{i}" for i in range(of)]
    text = explain_messages(
        [
            Fragment(tokens[:2], [1] * min(fires, 2) + [0] * (2 - min(fires, 2))),
            Fragment(tokens[2:], [7] * max(0, fires - 2) + [0] * (of - max(2, fires))),
        ]
    )[-1]["content"]
    assert ("without the zeros" in text) == again
    assert text.count("w0\t") == 1 + (again and fires > 0) and text.count(f"w{of - 1}\t") == 1


def test_the_examples_are_whole_and_no_answer_is_given_away():
    for some, why in SHOTS:
        autointerp.check_features("shots", [some])
        assert all(max(f.acts) > 0 for f in some)
    for messages in (
        explain_messages(FEATURE),
        simulate_messages("x"),
        simulate_messages("x", ["a"]),
    ):
        assert [m["role"] for m in messages] == ["user", "assistant"] * len(SHOTS) + ["user"]
    asked = simulate_messages("two\nlines", ["a\tb", "c"])[-1]["content"]
    assert asked.split("\n") == ["Explanation: two lines", "", "a\\tb\tunknown", "c\tunknown"]


@pytest.mark.parametrize("acts", [None, [1, 2], [0] * 5 + [11], [0] * 5 + [0.5], [0] * 5 + [-1]])
def test_acts_are_integers_one_a_token(acts, tmp_path):
    for explainer in (
        APIExplainer("m", "http://127.0.0.1:9/v1", tmp_path),
        LocalLMExplainer(*local("words")),
    ):
        with pytest.raises(
            ValueError, match="feature 1 has 6 tokens and acts .* expected an integer 0..10"
        ):
            explainer.explain([FEATURE, [Fragment(FEATURE[0].tokens, acts)]])
        with pytest.raises(ValueError, match="feature 0 has no fragments"):
            explainer.explain([[]])
        for wrong in ([], "text"):
            with pytest.raises(ValueError, match="expected a list of at least one string"):
                explainer.simulate([("why", wrong)])
        assert explainer.simulate([]) == explainer.explain([]) == []


# ---- a model on this machine
WORDS = [
    "<unk>",
    "<bos>",
    "<pad>",
    "unknown",
    *map(str, range(11)),
    "The",
    "cat",
    "storm",
    "rain",
    "Explanation:",
    "fires",
]
CHARS = [
    "<unk>",
    "<bos>",
    "<pad>",
    "▁",
    "\t",
    "\n",
    *"0123456789 abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;\"'()\\<>|!",
    "ï",
    "€",
]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}{% if "
    "add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_level(long_numbers):
    from tokenizers import Regex, Tokenizer, decoders, models, trainers
    from tokenizers import pre_tokenizers as pre

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre.Sequence(
        [
            pre.Split(
                Regex(
                    r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
                    + ("{1,3}" if long_numbers else "")
                    + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.train_from_iterator(
        ["a\tunknown\nthe\tunknown\n10 10 10 storm"] * 9,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<bos>", "<pad>"],
            initial_alphabet=pre.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return raw


def tokenizer(kind, chat=False):
    """bytes: GPT-4's way to cut, which joins a tab to the letters behind it, digits alone.

    bytes10: the same with a token 10; words: 10 is a word; marks: a ▁ before each word, cut
    into letters; letters: ▁ at the start alone."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers import pre_tokenizers as pre

    if kind.startswith("bytes"):
        raw = byte_level(long_numbers=kind == "bytes10")
    elif kind == "words":
        raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre.WhitespaceSplit()
    else:
        raw = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARS)}, [], unk_token="<unk>"))
        raw.pre_tokenizer = (
            pre.Sequence([pre.WhitespaceSplit(), pre.Metaspace()])
            if kind == "marks"
            else pre.Metaspace(prepend_scheme="first")
        )
        raw.decoder = decoders.Metaspace()
    tok = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token="<bos>",
        pad_token="<pad>",
        **({} if kind.startswith("bytes") else dict(unk_token="<unk>")),
    )
    if chat:
        tok.add_special_tokens(
            dict(additional_special_tokens=["<|user|>", "<|assistant|>", "<|end|>"])
        )
        tok.chat_template = TEMPLATE
    return tok


def local(kind, family="llama", chat=False, *, sharp=4, **more):
    "A random model that minds its context, and a tokenizer."
    tok, t = tokenizer(kind, chat), transformers
    common = dict(
        vocab_size=len(tok),
        bos_token_id=tok.bos_token_id,
        eos_token_id=None,
        initializer_range=0.25,
        **more,
    )
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=4096,
    )
    config = {
        "llama": lambda: t.LlamaConfig(**sizes, **common),
        "neox": lambda: t.GPTNeoXConfig(**sizes, **common),
        "gpt2": lambda: t.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=4096, **common),
        "mistral": lambda: t.MistralConfig(
            **sizes, sliding_window=99, num_key_value_heads=1, **common
        ),
        "bloom": lambda: t.BloomConfig(hidden_size=32, n_layer=2, n_head=2, **common),
    }[family]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config).eval()
    for name, p in model.named_parameters():
        p.data *= (
            sharp
            if any(part in name for part in ("attn", "attention", "attn.c_attn")) and p.dim() > 1
            else 1
        )  # so that it minds its context
    return model, tok


@torch.no_grad()
def exactly(model, tok, ids, *, slots, split, space=""):
    "The same by plain passes, one prompt each, from the probabilities of the whole vocabulary."
    after, out = lambda ids: model(torch.tensor([ids])).logits[0, -1].double().softmax(-1), []

    def digit(n):
        return tok.convert_tokens_to_ids(f"{space}{n}")

    for slot in slots:
        p = after(ids[: slot + 1])
        chance = [p[digit(n)].item() for n in range(10)]
        chance.append(
            chance[1] * after(ids[: slot + 1] + [digit(1)])[digit(0)].item()
            if split
            else p[digit(10)].item()
        )
        if split:
            chance[1] -= chance[10]
        out.append(sum(n * c for n, c in enumerate(chance)) / sum(chance))
    return out


ASKS = [
    ("words for kinds of weather", TOKENS),
    ("x", ["rain"]),
    ("the letter a, " * 5, ["a", " storm", " is", " 3", "\n\n"]),
]


@pytest.mark.parametrize("family", ["llama", "neox"])
@pytest.mark.parametrize(
    "kind, split, chat",
    [
        ("bytes", True, True),
        ("bytes", True, False),
        ("bytes10", False, True),
        ("words", False, False),
        ("marks", True, False),
        ("letters", True, True),
    ],
)
def test_the_expectation_is_that_of_plain_passes(kind, split, chat, family):
    model, tok = local(kind, family, chat)
    explainer = LocalLMExplainer(model, tok, batch=2)
    found = explainer.simulate(ASKS)
    assert (
        explainer.branching is (True if split else None) and (explainer.zero is not None) == split
    )
    for ask, got in zip(ASKS, found, strict=True):
        ids, slots = explainer._prompt(*ask)
        assert len(got) == len(ask[1]) == len(slots)
        torch.testing.assert_close(
            torch.tensor(got),
            torch.tensor(exactly(model, tok, ids, slots=slots, split=split)),
            atol=1e-4,
            rtol=1e-4,
        )
    assert max(found[0]) - min(found[0]) > 0.4  # it minds where it is


@pytest.mark.parametrize("family", ["gpt2", "bloom", "mistral"])
def test_other_models_branch_or_take_plain_passes(family):
    model, tok = local("bytes", family)
    explainer = LocalLMExplainer(model, tok)
    got = explainer.simulate(ASKS[1:])
    assert explainer.branching is (
        family == "gpt2"
    )  # BLOOM reads no positions, and Mistral's window of 99 is no part of our mask
    for ask, one in zip(ASKS[1:], got):
        ids, slots = explainer._prompt(*ask)
        torch.testing.assert_close(
            torch.tensor(one),
            torch.tensor(exactly(model, tok, ids, slots=slots, split=True)),
            atol=1e-4,
            rtol=1e-4,
        )


def test_in_half_precision_too():
    model, tok = local("bytes", sharp=1)
    want = LocalLMExplainer(model, tok).simulate(ASKS)
    half = LocalLMExplainer(model.bfloat16(), tok)
    for a, b in zip(want, half.simulate(ASKS)):
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=0.1, rtol=0)
    assert half.branching is True


def test_load_takes_a_folder_or_the_preset(tmp_path, monkeypatch):
    model, tok = local("words")
    model.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    assert LocalLMExplainer.load(str(tmp_path), batch=1).simulate(ASKS) == LocalLMExplainer(
        model, tok, batch=1
    ).simulate(ASKS)
    asked = []
    monkeypatch.setattr(
        explainers, "load_lm", lambda *args, **kw: asked.append((args, kw)) or (model, tok)
    )
    LocalLMExplainer.load(dtype=torch.float16)
    LocalLMExplainer.load("org/name", 2, 3)
    assert asked == [
        ((LocalLMExplainer.PRESET,), dict(bos="<|endoftext|>", dtype=torch.float16)),
        (("org/name",), {}),
    ]


@pytest.mark.parametrize(
    "kind, chat", [("bytes", True), ("bytes", False), ("bytes10", True), ("letters", False)]
)
def test_the_prompt_reads_as_written(kind, chat):
    _, tok = local(kind, chat=chat)
    explainer = LocalLMExplainer(*local(kind, chat=chat))
    tokens = [t for t in TOKENS if kind != "letters" or t.isascii()]
    ids, slots = explainer._prompt("why", tokens)
    lines = [escape_token(t) + "\t" for t in tokens]
    text = tok.decode(ids)
    assert (
        text.endswith(
            ("<|assistant|>" if chat else "\n") + "\n".join(line + "unknown" for line in lines)
        )
        and text.count("unknown") == len(tokens) + 7
    )
    for i, slot in enumerate(slots):
        assert tok.decode(ids[: slot + 1]).endswith(
            "\n".join([line + "unknown" for line in lines[:i]] + [lines[i]])
        )
        assert tok.decode(ids[slot + 1 :]).lstrip().startswith("unknown")
    assert (ids.count(tok.bos_token_id), ids[0] == tok.bos_token_id) == (
        (0, False) if chat else (1, True)
    )
    if kind == "bytes":
        assert "ĉun" in "".join(tok.tokenize("a\tunknown")) and any(
            t.startswith("ĉu") for t in tok.tokenize("a\tunknown")
        )  # the trap is there


def test_a_mark_that_stands_before_every_number_stands_before_the_slot():
    model, tok = local("marks")
    explainer = LocalLMExplainer(model, tok)
    ids, slots = explainer._prompt("why", ["a", "b"])
    assert tok.convert_ids_to_tokens(explainer.common) == ["▁"] and tok.convert_ids_to_tokens(
        ids[slots[0] - 2 :]
    ) == [*"▁a▁unknown▁b▁unknown"]


def test_special_tokens_in_a_text_are_only_text():
    model, tok = local("bytes", chat=True)
    explainer = LocalLMExplainer(model, tok)

    def special(ids):
        return [i for i in ids if i in tok.all_special_ids]

    plain, _ = explainer._prompt("why", ["a"])
    tricky, slots = explainer._prompt("<|end|> why", ["<bos>", "<|assistant|>"])
    assert special(tricky) == special(plain) and len(special(plain)) == 11 and len(slots) == 2
    feature = [Fragment(["<|end|>", "<bos>"], [0, 10])]
    assert special(explainer._ids(explainer._text(explain_messages(feature)))) == special(plain)


def test_numbers_that_the_tokenizer_cannot_write():
    model, tok = local("words")

    def without(*words):
        from tokenizers import Tokenizer, models, pre_tokenizers

        raw = Tokenizer(
            models.WordLevel(
                {w: i for i, w in enumerate(w for w in WORDS if w not in words)}, unk_token="<unk>"
            )
        )
        raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")

    for words in (["7"], ["10"], list(map(str, range(11)))):
        with pytest.raises(ValueError, match="expected one token of its own for each of 0..9"):
            LocalLMExplainer(model, without(*words))


@pytest.mark.parametrize("chat", [False, True])
@torch.no_grad()
def test_explain_is_greedy_and_takes_the_first_line(chat):
    model, tok = local("bytes", chat=chat)
    model.generation_config.update(
        do_sample=True, repetition_penalty=3.0, temperature=5.0
    )  # the model's own wishes do not count
    explainer = LocalLMExplainer(model, tok, batch=2, new_tokens=12)
    features = [FEATURE, [Fragment(["x", "y"], [10, 0])], FEATURE * 2]
    for feature, got in zip(features, explainer.explain(features), strict=True):
        ids = explainer._ids(explainer._text(explain_messages(feature)))
        for _ in range(12):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
        assert (
            got == clean_phrase(tok.decode(ids[-12:], skip_special_tokens=True)) and "\n" not in got
        )


def test_the_first_line_of_an_answer():
    for text, phrase in [
        ('\n  "months" \nand more', "months"),
        ("<think>hm\nhm</think>\n\nnames", "names"),
        ("<think>never ends\nx", ""),
        ("", ""),
        ("a\tb", "a\tb"),
        ('the word that follows "very"', 'the word that follows "very"'),
        ('"gave" or "handed"', '"gave" or "handed"'),
        ("`x`", "x"),
        ("Okay, hm\n</think>\n\nmonths", "months"),
        ('"', '"'),
        ("Here is the phrase:\nwords for weather", "words for weather"),
        ("Sure!\n\nwords for weather", "words for weather"),
        ("Sure, here you are:\n- words for weather", "words for weather"),
        ("```\nwords for weather\n```", "words for weather"),
        ("```text\nwords for weather\n```", "words for weather"),
        ("Explanation: words for weather", "words for weather"),
        ("**Explanation:** words for weather", "words for weather"),
        ("**words for weather**", "words for weather"),
        ("- words for weather", "words for weather"),
        ('{"explanation": "words for \\"weather\\""}', 'words for "weather"'),
        ("Here is the phrase:", ""),  # asked again
        ("here, there and everywhere", "here, there and everywhere"),
        ("sure signs of rain", "sure signs of rain"),
    ]:
        assert clean_phrase(text) == phrase


def test_a_prompt_too_long_says_so_and_the_mode_is_left_as_it_was():
    model, tok = local("bytes", attention_dropout=0.5)
    want = LocalLMExplainer(model, tok).simulate(ASKS[1:2])
    model.train()
    explainer = LocalLMExplainer(model, tok, new_tokens=3)
    assert explainer.simulate(ASKS[1:2]) == want and explainer.explain(
        [FEATURE]
    ) == LocalLMExplainer(model.eval(), tok, new_tokens=3).explain([FEATURE])
    model.train()
    explainer.explain([FEATURE])
    assert model.training
    model.config.max_position_embeddings = 500
    for call in (lambda: explainer.simulate(ASKS), lambda: explainer.explain([FEATURE])):
        with pytest.raises(
            ValueError, match="the model reads 500; expected fewer or shorter fragments"
        ):
            call()


# ---- a model behind an address
class Endpoint:
    """`with Endpoint(...) as api`: chat completions on this machine.

    Faults are used up one a request: a status, (status, headers), bytes to send as they are,
    'hang', 'cut', or a function of the request."""

    def __init__(self, *faults, answer=None, logprobs=True, split=False, dies_after=None, hold=0.0):
        self.faults, self.answer, self.logprobs, self.split, self.dies_after, self.hold = (
            list(faults),
            answer or number,
            logprobs,
            split,
            dies_after,
            hold,
        )
        (
            self.asked,
            self.keys,
            self.times,
            self.served,
            self.now,
            self.most,
            self.lock,
            self.release,
        ) = [], [], [], 0, 0, 0, threading.Lock(), threading.Event()

    def __enter__(self):
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Handler", (_Handler,), {"api": self})
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs=dict(poll_interval=0.01), daemon=True
        ).start()
        return self

    def __exit__(self, *_):
        self.release.set()
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def send(self, status, body, **headers):
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer(self, request, fault):
        "Right, or as the fault has it."
        api = self.api
        if fault == "hang":
            api.release.wait(5)
        elif fault == "cut":
            self.send(200, b'{"choices": [', **{"Content-Length": "999"})
        elif isinstance(fault, bytes):
            self.send(200, fault)
        elif fault:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.send(
                status,
                json.dumps({"error": {"message": f"no: {self.headers['Authorization']}"}}).encode(),
                **headers,
            )
        else:
            self.send(200, json.dumps(completion(api, request)).encode())

    def do_POST(self):
        api, request = self.api, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with api.lock:
            if api.dies_after is not None and api.served >= api.dies_after:
                return setattr(self, "close_connection", True)
            api.asked.append(request)
            api.keys.append(self.headers["Authorization"])
            api.times.append(time.monotonic())
            api.now += 1
            api.most = max(api.most, api.now)
            api.served += 1
            fault = api.faults.pop(0) if api.faults else None
            if api.served == api.dies_after:
                threading.Thread(
                    target=lambda: (api.server.shutdown(), api.server.server_close())
                ).start()
        if callable(fault):
            fault = fault(request)
        if api.hold:
            time.sleep(api.hold)
        try:
            self.answer(request, fault)
        except BrokenPipeError:
            pass
        finally:
            with api.lock:
                api.now -= 1


def number(token):
    return 10 if token.endswith("0") else len(token) % 8


def completion(api, request):
    """A phrase for a feature; for a text lines of numbers,
    with alternatives where they are asked for."""
    asked = request["messages"][-1]["content"]
    if "Explanation:" not in asked:
        return body([asked.split("\t")[0]])
    if "\n\nText: " in asked:
        yes = "storm" in asked.split("\n\nText: ")[1]
        return body(
            ["Yes" if yes else " no", "."],
            api.logprobs and request.get("logprobs"),
            lambda piece: {
                piece: math.log(0.6),
                "yes": math.log(0.1),
                "No": math.log(0.2),
                "maybe": math.log(0.1),
            },
        )
    pieces, last = [], asked.split("\n\n", 1)[1].split("\n")
    for i, line in enumerate(last):
        token = line.rpartition("\t")[0]
        n = str(api.answer(token))
        pieces += [token, "\t", *(n if api.split else [n]), *(["\n"] if i < len(last) - 1 else [])]
    return body(pieces, api.logprobs and request.get("logprobs"))


def body(pieces, logprobs=False, alternatives=None):
    alts = alternatives or (
        lambda piece: (
            {piece: math.log(0.6), "3": math.log(0.2), "cat": math.log(0.2)}
            if piece.isdigit()
            else {piece: 0.0}
        )
    )

    def entry(text, lp):
        return dict(token=text, logprob=lp, bytes=list(text.encode()))

    content = [
        entry(p, alts(p)[p]) | dict(top_logprobs=[entry(*a) for a in alts(p).items()])
        for p in pieces
    ]
    return dict(
        id="x",
        object="chat.completion",
        created=0,
        model="m",
        choices=[
            dict(
                index=0,
                finish_reason="stop",
                message=dict(role="assistant", content="".join(pieces)),
                logprobs=dict(content=content) if logprobs else None,
            )
        ],
    )


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    "No key and no proxy, unless a test says so."
    for name in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "HTTP_PROXY",
        "http_proxy",
        "ALL_PROXY",
        "all_proxy",
    ):
        monkeypatch.delenv(name, raising=False)


def at(api, tmp_path, **more):
    return APIExplainer(
        "m",
        api if isinstance(api, str) else api.url,
        tmp_path / "cache",
        **dict(backoff=0.001, timeout=5.0, max_concurrency=1) | more,
    )


def files(tmp_path):
    return sorted((tmp_path / "cache").glob("*"))


def written(tokens):
    return [float(number(escape_token(t))) for t in tokens]


ASK = [("ten", TOKENS)]
MANY = [(f"why {i}", [f"a{i}", " b", f" {i}0"]) for i in range(6)]
FEATURES = [[Fragment([f"w{i}", "x"], [10, 0])] for i in range(6)]


def test_what_goes_over_the_wire_and_comes_back(tmp_path):
    with Endpoint() as api:
        explainer = at(api, tmp_path, seed=3, temperature=None)
        assert explainer.explain(FEATURES) == [f"w{i}" for i in range(6)]
        found = explainer.simulate(MANY + MANY[:2])
    assert len(api.asked) == 12 == len(files(tmp_path))  # the same twice is asked once
    assert found[:2] == found[6:] and all(len(x) == 3 for x in found)
    for feature, request in zip(FEATURES, api.asked):
        assert request == dict(
            model="m", messages=explain_messages(feature), max_tokens=100, seed=3
        )
    for (why, tokens), request in zip(MANY, api.asked[6:]):
        assert request.pop("max_tokens") >= len(token_lines(tokens))
        assert request == dict(
            model="m",
            messages=simulate_messages(why, tokens),
            seed=3,
            logprobs=True,
            top_logprobs=20,
        )


def test_the_expectation_is_taken_over_the_alternatives(tmp_path):
    with Endpoint() as api:
        explainer = at(api, tmp_path)
        (found,) = explainer.simulate(ASK)
    assert explainer.way == "log-probabilities" and explainer.simulate(ASK) == [found]
    assert found == pytest.approx(
        [n if n == 3 else (0.6 * n + 0.2 * 3) / 0.8 for n in written(TOKENS)]
    )
    assert (
        all(json.loads(f.read_text())["answer"]["tokens"] for f in files(tmp_path))
        and 'cat": ' not in files(tmp_path)[0].read_text()
    )


@pytest.mark.parametrize("split", [False, True])
def test_a_ten_in_two_tokens(split, tmp_path):
    """1 then 0: P(10) = P(1) P(0 | 1).

    1 then the end of the line: the same, from the next token's alternatives."""
    alternatives = {
        "1": {"1": 0.5, "4": 0.3, "x": 0.2},
        "0": {"0": 0.9, "\n": 0.1},
        "\n": {"\n": 0.75, "0": 0.25},
        "10": {"10": 0.5, "1": 0.2, "4": 0.3},
    }

    def given(request):
        return json.dumps(
            body(
                ["a", "\t", *(["1", "0"] if split else ["10"]), "\n", "b", "\t", "1", "\n"],
                True,
                lambda p: {t: math.log(v) for t, v in alternatives.get(p, {p: 1.0}).items()},
            )
        ).encode()

    with Endpoint(given) as api:
        (found,) = at(api, tmp_path).simulate([("why", ["a", "b"])])
    ten = (0.45 * 10 + 0.05 * 1 + 0.3 * 4) / 0.8 if split else (0.5 * 10 + 0.2 + 0.3 * 4)
    assert found == pytest.approx([ten, (0.125 * 10 + 0.375 * 1 + 0.3 * 4) / 0.8])


def test_without_log_probabilities_the_numbers_as_written(tmp_path):
    with Endpoint(logprobs=False) as api:
        explainer = at(api, tmp_path)
        assert (
            explainer.simulate(ASK) == [written(TOKENS)] and explainer.way == "numbers as written"
        )
    with Endpoint() as api:
        explainer = at(api, tmp_path, top_logprobs=0)
        assert (
            explainer.simulate(ASK) == [written(TOKENS)]
            and explainer.way == "numbers as written"
            and "logprobs" not in api.asked[0]
        )


def test_where_one_answer_lacks_log_probabilities_all_are_read_as_written(tmp_path):
    def cut(change):
        return lambda request: json.dumps(change(completion(Endpoint(), request))).encode()

    def no_alternatives(b):
        b["choices"][0]["logprobs"]["content"][2]["top_logprobs"] = []
        return b

    def other_text(b):
        b["choices"][0]["logprobs"]["content"][0]["bytes"] = None
        b["choices"][0]["logprobs"]["content"][0]["token"] = "?"
        return b

    def no_number(b):
        entry = b["choices"][0]["logprobs"]["content"][2]
        entry["top_logprobs"][0]["logprob"] = entry["logprob"] = None
        return b

    for change in (no_alternatives, other_text, no_number):
        with Endpoint(
            None, cut(change)
        ) as api:  # one of two answers lacks something: one way for both
            explainer = at(api, tmp_path / change.__name__)
            assert (
                explainer.simulate([("fine", ["a", "b"]), ("not", ["c", "d"])])
                == [[1.0, 1.0], [1.0, 1.0]]
                and explainer.way == "numbers as written"
            )


# ---- faults
@pytest.mark.parametrize(
    "faults, timeout",
    [
        ([500, 503], 5.0),
        ([429, 408], 5.0),
        (["cut"], 5.0),
        (["hang"], 0.08),
        ([b'{"choices": ['], 5.0),
        ([b"<html>busy</html>", b'{"choices": []}'], 5.0),
        ([b"[]", b'{"choices": [{"message": {"content": null}}]}'], 5.0),
    ],
)
def test_faults_that_pass(faults, timeout, tmp_path):
    with Endpoint(*faults) as api:
        assert (
            at(api, tmp_path, timeout=timeout).explain(FEATURES[:1]) == ["w0"]
            and len(api.asked) == len(faults) + 1
        )
    assert len(files(tmp_path)) == 1 and files(tmp_path)[0].suffix == ".json"


def test_waits_as_long_as_it_is_told(tmp_path):
    with Endpoint((429, {"Retry-After": "0.08"}), 429, (503, {"Retry-After": "0.05"})) as api:
        at(api, tmp_path, backoff=0.0).explain(FEATURES[:1])
    waits = [b - a for a, b in zip(api.times, api.times[1:])]
    assert waits[0] >= 0.08 and waits[2] >= 0.05 and waits[1] < 0.05
    with Endpoint((429, {"Retry-After": "3600"})) as api:
        with pytest.raises(ValueError, match="answers 429 and wants us to wait 3600 s"):
            at(api, tmp_path / "2").explain(FEATURES[:1])
        assert len(api.asked) == 1
    soon = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 50 < wire.wait_seconds(soon) <= 60
    for value, seconds in [
        (None, 0),
        ("2", 2),
        ("-3", 0),
        ("soon", 0),
        ("Wed, 01 Jan 2020 00:00:00 GMT", 0),
        ("nan", 0),
        ("Wed, 01 Jan 2020 00:00:00", 0),
    ]:
        assert wire.wait_seconds(value) == seconds


def test_waits_longer_each_time_and_never_the_same():
    for n in range(1, 6):
        waits = [wire.delay(n, 0.5) for _ in range(50)]
        assert (
            0.25 * 2 ** (n - 1) <= min(waits) < max(waits) <= 0.75 * 2 ** (n - 1)
            and len(set(waits)) > 40
        )
    assert wire.delay(30, 0.5) <= wire.LONGEST and wire.delay(1, 0.5, after=7.0) == 7.0


def test_gives_up_after_so_many_retries(tmp_path):
    with Endpoint(*[500] * 9) as api:
        with pytest.raises(ConnectionError, match=r"answers 500: .*0 of 6 answers are done"):
            at(api, tmp_path, retries=3).explain(FEATURES)
        assert len(api.asked) == 4
    with Endpoint(*["hang"] * 9) as api:
        with pytest.raises(ConnectionError, match="no answer from 127.0.0.1:.* in 0.05 s"):
            at(api, tmp_path, retries=1, timeout=0.05).explain(FEATURES)


@pytest.mark.parametrize(
    "status, says",
    [
        (400, "does not take the request"),
        (401, "does not take the key in OPENAI_API_KEY"),
        (403, "may not use 'm'"),
        (404, "no model 'm'"),
        (422, "answers 422"),
    ],
)
def test_refusals_are_final(status, says, tmp_path):
    with Endpoint(None, None, status) as api:
        with pytest.raises(
            ValueError,
            match=rf"APIExplainer.explain: 'feature 2': .*{says}.*2 of 6 answers are done",
        ):
            at(api, tmp_path).explain(FEATURES)
        assert len(api.asked) == 3
        assert (
            at(api, tmp_path).explain(FEATURES) == [f"w{i}" for i in range(6)]
            and len(api.asked) == 3 + 4
        )


def test_what_a_refusal_says_and_whether_it_may_pass():

    def says(*refusal):
        trouble = wire.refusal(*refusal, host="h", model="m")
        return trouble.kind, trouble.says

    assert (
        "top_logprobs=0 asks for no log-probabilities"
        in says(400, "logprobs are not supported", 0.0)[1]
        and "top_logprobs" not in says(400, "too long", 0.0)[1]
    )
    assert (
        says(429, "insufficient_quota", 0.0)[0]
        == says(409 + 1, "", 0.0)[0]
        == says(503, "", 121.0)[0]
        == "stop"
        and says(503, "", 119.0)[0] == says(429, "", 0.0)[0] == says(599, "", 0.0)[0] == "wait"
    )
    spent = json.dumps(
        dict(
            error=dict(
                message="You exceeded your current quota, please check your plan and billing "
                "details. For more information on this error, read the docs: "
                "https://platform.openai.com/docs/guides/error-codes/api-errors. " * 2,
                type="insufficient_quota",
                param=None,
                code="insufficient_quota",
            )
        )
    )
    assert says(429, spent, 0.0)[0] == "stop" and len(says(429, spent, 0.0)[1]) < 300, (
        "the reason stands far behind in the real answer"
    )


def test_a_useless_answer_is_asked_again_and_then_named_and_the_others_are_kept(tmp_path):
    def bad(tokens):
        return json.dumps(body(tokens)).encode()

    def by(request):
        return (
            bad(["a1\t3\nno number\n 10\t4"]) if "why 1" in str(request["messages"][-1]) else None
        )

    with Endpoint(*[by] * 99) as api:
        explainer = at(api, tmp_path, max_concurrency=2)
        with pytest.raises(
            ValueError,
            match=r"'why 1': expected a token, a tab and a number 0..10 on each line, got 'no "
            r"number'.* 5 of 6 answers are done",
        ):
            explainer.simulate(MANY)
        assert len(api.asked) == 5 + 1 + wire.BAD_ANSWERS and len(files(tmp_path)) == 5
        api.faults = []
        assert len(explainer.simulate(MANY)) == 6 and len(api.asked) == 9


def test_numbers_are_read_line_by_line_or_refused():
    for text, says in [
        ("x\t1", "expected 2 lines, got 1: 'x 1'"),
        ("x\t1\ny\t11", "got 'y 11'"),
        ("x\t1\ny\t-1", "got"),
        ("", "expected 2 lines, got 0"),
        ("1\n2\n3", "got 3"),
        ("x" * 999, "xxx ..."),
    ]:
        with pytest.raises(ValueError) as e:
            answers.read_numbers(dict(text=text, tokens=None), ["x", "y"])
        assert says in str(e.value) and len(str(e.value)) < 300
    for text in ("x\t1\ny\t2.5\n", "```\nx\t1\ny\t2.5\n```", "<think>\n3\n</think>\n1\n\n2.5\r\n"):
        assert answers.read_numbers(dict(text=text, tokens=None), ["x", " y"]) == (
            [1.0, 2.5],
            None,
        )
    assert answers.read_numbers(dict(text="```\t1\n\\n\t2.5", tokens=None), ["```", "\n"])[0] == [
        1.0,
        2.5,
    ]
    with pytest.raises(ValueError, match="expected a line for 'b', got one for 'c'"):
        answers.read_numbers(dict(text="a\t0\nc\t9\nd\t0\nd\t0", tokens=None), ["a", "b", "c", "d"])


@pytest.mark.parametrize("workers", [1, 4])
def test_a_server_that_dies_half_way_and_one_that_goes_on(workers, tmp_path, capsys):
    asks = [(f"why {i}", ["a", f" {i}"]) for i in range(20)]
    with Endpoint(dies_after=9) as api:
        explainer = at(api, tmp_path, max_concurrency=workers, retries=1)
        with pytest.raises(ConnectionError) as e:
            explainer.simulate(asks)
    kept = len(files(tmp_path))
    assert (
        kept == 9
        and f"9 of 20 answers are done and kept in {tmp_path / 'cache'}: calling again asks only "
        f"for the other 11"
        in str(e.value)
        and "no connection" in str(e.value)
    )
    with Endpoint() as api:  # at another address
        found = at(api, tmp_path, max_concurrency=workers).simulate(asks)
        assert len(api.asked) == 11 and "11 calls" in capsys.readouterr().out
    with Endpoint() as api:
        assert at(api, tmp_path / "anew").simulate(asks) == found


def test_a_notebook_replays_without_server_key_or_address(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint() as api:
        first = (explainer := at(api, tmp_path)).explain(FEATURES), explainer.simulate(MANY)
    monkeypatch.delenv("OPENAI_API_KEY")
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "openai", None)  # not even the client
    replay = APIExplainer("m", cache=tmp_path / "cache")
    assert (
        (replay.explain(FEATURES), replay.simulate(MANY)) == first
        and replay.way == "log-probabilities"
        and capsys.readouterr().out == ""
    )
    assert replay.estimate(FEATURES, MANY) == dict(
        calls=0, cached=12, tokens_in=0, tokens_out=0, dollars=None
    )
    monkeypatch.undo()
    others = (
        APIExplainer("n", cache=tmp_path / "cache"),
        APIExplainer("m", cache=tmp_path / "cache", seed=1),
    )
    with Endpoint() as api:
        for other in others:
            other.base_url = api.url
            assert other.estimate(FEATURES)["calls"] == 6 and other.explain(FEATURES) == first[0]
    assert len(files(tmp_path)) == 12 + 6 + 6 and all(
        one.estimate(FEATURES)["calls"] == 0 for one in (replay, *others)
    )  # side by side in one folder


def test_damaged_files_are_asked_again(tmp_path):
    with Endpoint() as api:
        explainer = at(api, tmp_path)
        want, whole = explainer.simulate(ASK), files(tmp_path)[0].read_text()
        other = json.loads(whole)
        other["request"]["model"] = "n"
        empty = json.loads(whole)
        empty["answer"]["text"] = ""
        for n, damage in enumerate(
            [
                whole[: len(whole) // 2],
                "",
                "[1]",
                "null",
                json.dumps(other),
                json.dumps(empty),
                b"\xff\xfe",
                json.dumps(json.loads(whole) | dict(answer=3)),
            ]
        ):
            files(tmp_path)[0].write_bytes(damage if isinstance(damage, bytes) else damage.encode())
            assert (
                explainer.simulate(ASK) == want
                and len(api.asked) == n + 2
                and files(tmp_path)[0].read_text() == whole
            )


def test_a_broken_write_leaves_no_answer(tmp_path, monkeypatch):
    def breaks(self, to):
        raise OSError("disk full")

    with Endpoint() as api:
        with monkeypatch.context() as m:
            m.setattr(Path, "replace", breaks)
            with pytest.raises(OSError, match="disk full"):
                at(api, tmp_path).explain(FEATURES)
        assert not [f for f in files(tmp_path) if f.suffix == ".json"]
        assert at(api, tmp_path).explain(FEATURES)[0] == "w0" and {
            f.suffix for f in files(tmp_path)
        } == {".json"}


@pytest.mark.parametrize("bound", [1, 3])
def test_never_more_at_once_than_allowed(bound, tmp_path):
    with Endpoint(hold=0.02) as api:
        at(api, tmp_path, max_concurrency=bound).explain(
            [[Fragment([f"w{i}"], [1])] for i in range(12)]
        )
    assert len(api.asked) == 12 and (api.most == 1 if bound == 1 else 1 < api.most <= bound)


def test_interrupted_by_hand_keeps_what_was_under_way(tmp_path, request):
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background inherits that it is ignored
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Endpoint(
        None, None, lambda request: os.kill(os.getpid(), signal.SIGINT), hold=0.05
    ) as api:
        with pytest.raises(KeyboardInterrupt):
            at(api, tmp_path).explain(FEATURES)
        assert 2 <= len(files(tmp_path)) <= 3 == len(api.asked)
        n = len(files(tmp_path))
        at(api, tmp_path).explain(FEATURES)
        assert len(api.asked) == 3 + 6 - n


# ---- the key
def test_no_key_says_where_it_belongs(tmp_path):
    with pytest.raises(
        ValueError,
        match="no key for api.openai.com; expected it in the environment, as OPENAI_API_KEY",
    ):
        APIExplainer("m", cache=tmp_path).explain(FEATURES)
    for url, here in [
        ("http://127.0.0.1:8000/v1", True),
        ("http://localhost/v1", True),
        ("http://[::1]:9/v1", True),
        ("http://127.0.0.1.example.com/v1", False),
        ("https://example.com/v1", False),
        ("http://10.0.0.1/v1", False),
    ]:
        assert wire.is_loopback(wire.urlsplit(url).hostname) == here
        if not here:
            with pytest.raises(ValueError, match="no key for"):
                wire.open_client(url, 60.0)
    with Endpoint() as api:
        at(api, tmp_path).explain(FEATURES[:1])
        assert api.keys == ["Bearer none"]


def test_what_an_explainer_refuses():
    for wrong in (
        dict(max_concurrency=0),
        dict(retries=-1),
        dict(extra_headers={}),
        dict(stream=True),
    ):
        with pytest.raises(ValueError, match="APIExplainer: .*; expected"):
            APIExplainer("m", **wrong)
    for url in ("localhost:8000/v1", "example.com", "ftp://x/v1", "http://"):
        with pytest.raises(ValueError, match="expected an address such as http"):
            APIExplainer("m", url)
    with pytest.raises(ValueError, match="parameters that JSON can hold"):
        APIExplainer("m", stop={1})


def test_parameters_that_json_writes_otherwise_are_found_in_the_cache(tmp_path):
    more = dict(logit_bias={5: 1}, stop=("\n",))
    with Endpoint() as api:
        at(api, tmp_path, **more).explain(FEATURES[:1])
    assert at(api, tmp_path, **more).estimate(FEATURES[:1])["cached"] == 1 and at(
        api, tmp_path, **more
    ).explain(FEATURES[:1]) == ["w0"]


@pytest.mark.parametrize(
    "trouble",
    [
        dict(base_url="https://example.com:port/v1"),
        dict(HTTPS_PROXY="127.0.0.1:abc"),
        dict(SSL_CERT_FILE="/nonexistent"),
    ],
    ids=lambda t: next(iter(t)),
)
def test_the_key_is_in_no_frame_when_no_client_can_be_made(trouble, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for name, value in trouble.items():
        if name != "base_url":
            monkeypatch.setenv(name, value)
    explainer = at(
        trouble.get("base_url", "https://example.com/v1"), tmp_path, retries=0, timeout=0.5
    )
    with pytest.raises((ValueError, ConnectionError), match="APIExplainer") as e:
        explainer.explain(FEATURES[:1])
    seen, error = [], e.value
    while error:
        frame = error.__traceback__
        while frame:
            seen += [
                repr(v) for k, v in frame.tb_frame.f_locals.items() if isinstance(v, str | bytes)
            ]
            frame = frame.tb_next
        error = None if error.__suppress_context__ else error.__cause__ or error.__context__
    assert seen and not [v for v in seen if KEY[:12] in v]


def exposed(explainer, e, tmp_path):
    "What a user may print of an explainer and its error, and what lies on disk."
    return [
        repr(explainer),
        str(explainer),
        repr(vars(explainer)),
        str(e.value),
        repr(e.value),
        *traceback.format_exception(e.value),
        *traceback.TracebackException.from_exception(e.value, capture_locals=True).format(),
        *(f.read_text() + f.name for f in files(tmp_path)),
    ]


@pytest.mark.parametrize(
    "fault",
    [
        401,
        403,
        400,
        500,
        (429, {"Retry-After": "999"}),
        "hang",
        "cut",
        "garbage",
        "down",
        "newline",
        "other",
        "wrong argument",
    ],
)
def test_the_key_is_nowhere(fault, tmp_path, monkeypatch, caplog, capfd):
    caplog.set_level("DEBUG")
    for name in ("openai", "httpx", "httpx2", "httpcore"):
        caplog.set_level("DEBUG", logger=name)
    monkeypatch.setenv(
        "OPENAI_API_KEY", KEY + {"newline": "\nX: y", "other": "é"}.get(str(fault), "")
    )

    def echo(request):
        return json.dumps(
            body([f"a phrase with {KEY}"])
        ).encode()  # the server says it back: in an answer, in a refusal, in rubbish

    faults = [echo] + (
        [lambda request: f"{{{KEY}".encode()] * 9
        if fault == "garbage"
        else [fault] * 9
        if fault not in ("down", "newline", "other", "wrong argument")
        else []
    )
    with Endpoint(*faults, dies_after=1 if fault == "down" else None) as api:
        explainer = at(
            api,
            tmp_path,
            timeout=0.05,
            retries=1,
            **(dict(no_such=1) if fault == "wrong argument" else {}),
        )
        with pytest.raises((ValueError, ConnectionError)) as e:
            explainer.explain(FEATURES)
    shown = [*exposed(explainer, e, tmp_path), caplog.text, *capfd.readouterr()]
    assert not [text for text in shown if KEY[:12] in text or KEY[-10:] in text]
    assert e.value.__context__ is None or e.value.__suppress_context__
    if fault not in ("newline", "other", "wrong argument"):
        assert api.keys[0] == f"Bearer {KEY}" and "[key]" in files(tmp_path)[0].read_text()


def test_an_answer_that_holds_the_key_is_given_back_without_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with Endpoint(lambda request: json.dumps(body([f"it is {KEY}"])).encode()) as api:
        assert (
            at(api, tmp_path).explain(FEATURES[:1])
            == at(api, tmp_path).explain(FEATURES[:1])
            == ["it is [key]"]
        )


# ---- what it will cost
def test_the_estimate_is_printed_before_the_first_call(tmp_path, capsys):
    with Endpoint(lambda request: shown.append(capsys.readouterr().out)) as api:
        shown, explainer = [], at(api, tmp_path, price=(2.0, 8.0))
        cost = explainer.estimate(FEATURES, MANY)
        explainer.explain(FEATURES)
    assert cost["calls"] == 12 and cost["cached"] == 0 and cost["tokens_out"] == 6 * 20 + 6 * 12
    sent = sum(
        len(m["content"].encode())
        for r in [*map(explain_messages, FEATURES), *(simulate_messages(*ask) for ask in MANY)]
        for m in r
    )
    assert sent / 4 < cost["tokens_in"] < sent / 2 and cost["dollars"] == pytest.approx(
        (cost["tokens_in"] * 2 + cost["tokens_out"] * 8) / 1e6
    )
    one = explainer.estimate([[Fragment(["new"], [1])]])
    assert (
        "explain: 6 calls to 127.0.0.1:" in shown[0]
        and "(0 more are in the cache), about " in shown[0]
        and ", about $0.0" in shown[0]
    )
    assert explainer.estimate(FEATURES, MANY)["cached"] == 6 and one["calls"] == 1


# ---- yes or no
JUDGED = [
    ("words for weather", [" a", " storm"], None),
    ("words for weather", [" a", " cat"], None),
    ("words for weather", [" a", " storm"], [1]),
    ("words for weather", [" a", " storm"], [0]),
]


def test_what_a_judge_is_asked():
    plain, marked = (judge_messages(why, tokens, some) for why, tokens, some in JUDGED[1:3])
    assert plain[-1]["content"] == "Explanation: words for weather\n\nText:  a cat" and marked[-1][
        "content"
    ].endswith("Text:  a« storm»")
    for messages in (plain, marked):
        assert [m["content"] for m in messages[1::2]] == ["yes", "no"] and all(
            ("«" in m["content"].split("Text:")[-1]) == (messages is marked) for m in messages[0::2]
        )
    assert (
        "two lines" in judge_messages("two\nlines", ["a\tb"])[-1]["content"]
        and "a\\tb" in judge_messages("x", ["a\tb"])[-1]["content"]
    )


@pytest.mark.parametrize("kind, chat", [("bytes", True), ("bytes", False), ("letters", True)])
def test_a_local_judge_weighs_yes_against_no(kind, chat):
    model, tok = local(kind, chat=chat)
    explainer = LocalLMExplainer(model, tok, batch=3)
    got = explainer.judge(JUDGED)
    yes, no = explainer._yes_no()
    assert (
        not set(yes) & set(no)
        and len(got) == 4
        and all(0 <= p <= 1 for p in got)
        and len(set(got)) > 1
    )
    for p, ask in zip(got, JUDGED):
        with torch.no_grad():
            q = (
                model(torch.tensor([explainer._ids(explainer._text(judge_messages(*ask)))]))
                .logits[0, -1]
                .softmax(-1)
            )
        assert p == pytest.approx((q[yes].sum() / (q[yes].sum() + q[no].sum())).item(), abs=1e-5)
    with pytest.raises(ValueError, match="at least one string"):
        explainer.judge([("x", [], None)])


def test_a_tokenizer_that_cannot_tell_yes_from_no():
    explainer = LocalLMExplainer(*local("words"))
    with pytest.raises(ValueError, match="begins yes and no with the same token"):
        explainer.judge(JUDGED)


def test_a_judge_behind_an_address(tmp_path):
    with Endpoint() as api:
        assert at(api, tmp_path).judge(JUDGED) == pytest.approx(
            [0.7 / 0.9, 0.1 / 0.9, 0.7 / 0.9, 0.7 / 0.9]
        )
    assert api.asked[0]["max_tokens"] == 5 and len(api.asked) == 4
    assert (
        at("http://127.0.0.1:9/v1", tmp_path).judge(JUDGED)[1] == pytest.approx(0.1 / 0.9)
        and at(api, tmp_path).estimate(judgements=JUDGED)["cached"] == 4
    )
    with Endpoint(logprobs=False) as api:
        assert at(api, tmp_path / "b").judge(JUDGED) == [1.0, 0.0, 1.0, 1.0]
    quoted = dict(
        text='"Yes"', tokens=[[1, {"no": 0.001}], [3, {"yes": 0.99, "no": 0.01}], [1, {}]]
    )
    assert (
        answers.read_yes(quoted) == pytest.approx(0.99)
        and answers.read_yes(dict(text="<think>no</think>\n\nYes.", tokens=None)) == 1.0
    )
    with Endpoint(*[json.dumps(body(["perhaps"])).encode()] * 9) as api:
        with pytest.raises(ValueError, match="expected yes or no, got 'perhaps'"):
            at(api, tmp_path / "c").judge(JUDGED[:1])
