"""Explainers that are language models: one that runs here, one behind an address (issue 6, 2b and 2c). Draft, to be exported from 09_autointerp."""
__all__ = ["Fragment", "SHOTS", "explain_messages", "simulate_messages", "LocalLMExplainer", "APIExplainer"]

import hashlib, ipaddress, json, math, os, random, re, threading
from bisect import bisect_right
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from urllib.parse import urlsplit
import torch
from tqdm.auto import tqdm
from codebook_tutorial.models import _evaluating, load_lm, next_probs

# ---- prompts
@dataclass
class Fragment:
    "A piece of text, and how strongly a feature reacts to each of its tokens."
    tokens: list                 # strings, as the tokenizer cuts them
    acts: list | None = None     # integers 0..10, one a token; None: unknown

SHOTS = (    # ours: (fragments, their explanation)
    ([Fragment(["The", " storm", " passed", ",", " so", " we", " left", " the", " house", " in", " light", " snow", "."], [0, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 10, 0]),
      Fragment(["She", " hung", " her", " coat", " up", " and", " asked", " if", " the", " rain", " had", " stopped"], [0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0])], "words for kinds of weather"),
    ([Fragment(["It", " was", " very", " cold", ",", " but", " not", " very", " far"], [0, 0, 0, 10, 0, 0, 0, 1, 9]), Fragment(["A", " very", " old", " cat"], [0, 0, 9, 1])], "the word that follows \"very\""))
_ABOUT = "A feature of a neural network reacts to some tokens of a text, with a strength from 0 (not at all) to 10 (most). "
_EXPLAIN = _ABOUT + ("Below are texts on which one feature is active: on each line a token, a tab, and the strength. Say what the feature fires on, that is, what the tokens with high numbers, "
                     "or the words right before them, have in common. Answer with one phrase of at most 20 words, and nothing else.")
_SIMULATE = _ABOUT + "You get an explanation of what a feature fires on, and a text. Say how strongly the feature reacts to each token: on each line the token, a tab, and an integer from 0 to 10 (`unknown` where it is not known yet). Most tokens get 0."

def _escape(token):              # -> the same on one line, without tabs
    return str(token).translate({92: "\\\\", 9: "\\t", 10: "\\n", 13: "\\r"})

def _lines(tokens, acts=None):   # -> "token<TAB>integer" lines; without acts "unknown" for each integer
    return "\n".join(f"{_escape(t)}\t{a}" for t, a in zip(tokens, ["unknown"] * len(tokens) if acts is None else acts, strict=True))

def _shown(fragments):           # -> what an explainer sees of a feature
    text = "\n\n".join(_lines(f.tokens, map(int, f.acts)) for f in fragments)
    fires = [[(t, int(a)) for t, a in zip(f.tokens, f.acts) if a] for f in fragments]
    few = sum(map(len, fires)) < .2 * sum(len(f.tokens) for f in fragments)
    return text + ("\n\nThe same without the zeros:\n" + "\n\n".join(_lines(*zip(*some)) for some in fires if some) if few else "") + "\n\nThe feature fires on:"

def _chat(instruction, *turns):  # [(asked, answered or None)] -> [{"role", "content"}]; no system role, which some chat templates refuse
    flat = [dict(role=role, content=text) for turn in turns for role, text in zip(("user", "assistant"), turn) if text is not None]
    return [flat[0] | dict(content=f"{instruction}\n\n{flat[0]['content']}"), *flat[1:]]

def explain_messages(fragments: list) -> list:
    "Chat messages that ask what a feature fires on, after two examples; where fewer than 20 % of the numbers are above 0, those are shown once more alone."
    return _chat(_EXPLAIN, *((_shown(some), why) for some, why in SHOTS), (_shown(fragments), None))

def simulate_messages(explanation: str, tokens: list | None = None) -> list:
    "Chat messages that ask for a number for each token; with tokens=None the answer is left to begin with its first token, and the examples hide their first numbers as `unknown`."
    def turn(why, f, acts): return f"Explanation: {' '.join(why.split())}" + (f"\n\n{_lines(f.tokens)}" if tokens else ""), acts and _lines(f.tokens, acts)
    return _chat(_SIMULATE, *(turn(why, f, f.acts if tokens else ["unknown"] * 3 + f.acts[3:]) for (f, *_), why in SHOTS), turn(explanation, Fragment(tokens or []), None))

def _check_features(call, features):
    for i, feature in enumerate(features):
        if not feature: raise ValueError(f"{call}: feature {i} has no fragments; expected at least one")
        for f in feature:
            n = None if f.acts is None else len(f.acts)
            if n != len(f.tokens) or any(a not in range(11) for a in f.acts): raise ValueError(f"{call}: a fragment of feature {i} has {len(f.tokens)} tokens and acts {f.acts}; expected an integer 0..10 for each token")

def _check_asks(call, asks):
    for explanation, tokens in asks:
        if not isinstance(tokens, list | tuple) or not tokens: raise ValueError(f"{call}: {explanation!r} comes with tokens={tokens!r}; expected a list of at least one string")

def _phrase(text):               # a model's answer -> its first line, without thoughts and quotes
    lines = [line.strip() for line in re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.S).split("\n") if line.strip()]
    return lines[0].strip("\"'` ") if lines else ""

# ---- a model on this machine
class LocalLMExplainer:
    """Explain and simulate with a causal language model of transformers, with or without a chat template; `load()` takes the preset.
    The simulator reads each number's probability from the logits at its slot, the position before `unknown`, renormalises over 0..10 and takes the expectation.
    Tokenizers with a token "10": one pass. Tokenizers that split it into "1", "0": P("10") = P("1") P("0" | "1"), and the number 1 keeps P("1") (1 - P("0" | "1")). That condition is exact at
    every slot, in the same pass: behind the prompt stands one more "1" for each slot, at the position after it, and a mask lets it see what stands before the slot, and itself, alone.
    A call's longest prompt is tried against plain passes; a model that does not take such masks gets one plain pass a slot (`branching` says which: True, or False: slow, as exact)."""
    PRESET = "Qwen/Qwen2.5-1.5B-Instruct"                 # 3.1 GB, fits a free Colab GPU; its tokenizer splits digits
    way = "log-probabilities"

    def __init__(self, model, tok,
                 batch: int = 4,                          # prompts in one pass
                 new_tokens: int = 40):                   # of an explanation, at most
        self.model, self.tok, self.batch, self.new_tokens, self.branching, self.tried = model, tok, batch, new_tokens, None, 0
        self.common, self.numbers, self.zero = _number_ids(tok)

    @classmethod
    def load(cls, name: str | None = None, batch: int = 4, new_tokens: int = 40, **kwargs):      # kwargs for load_lm: dtype, revision, bos, ...
        "One from a folder or Hub id, or the preset."
        return cls(*load_lm(name or cls.PRESET, **({} if name else dict(bos="<|endoftext|>")) | kwargs), batch, new_tokens)

    @torch.no_grad()
    def explain(self, features: list) -> list:            # for each feature its fragments -> one phrase each
        "What each feature fires on: greedy, the first line."
        _check_features("LocalLMExplainer.explain", features)
        prompts, found = [self._ids(self._text(explain_messages(fragments))) for fragments in features], {}
        self._check_length("explain", prompts, self.new_tokens)
        for some in self._batches(prompts, "explain"):
            ids, there = _pad([prompts[i] for i in some], "left")
            with _evaluating(self.model): out = self.model.generate(input_ids=ids.to(self.model.device), attention_mask=there.to(self.model.device), max_new_tokens=self.new_tokens, pad_token_id=self.tok.pad_token_id or 0,
                do_sample=False, num_beams=1, repetition_penalty=1., temperature=1., top_p=1., top_k=50)      # whatever the model's own generation_config says
            found |= zip(some, self.tok.batch_decode(out[:, ids.shape[1]:], skip_special_tokens=True))
        return [_phrase(found[i]) for i in range(len(features))]

    @torch.no_grad()
    def simulate(self, asks: list) -> list:               # [(explanation, tokens)] -> [[0..10 for each token]]
        "The expected strength at each token."
        _check_asks("LocalLMExplainer.simulate", asks)
        prompts, found = [self._prompt(*ask) for ask in asks], {}
        self._check_length("simulate", [ids for ids, _ in prompts])
        self._try_branches(max(prompts, key=lambda prompt: len(prompt[0]), default=None))
        for some in self._batches([ids for ids, _ in prompts], "simulate"): found |= zip(some, self._expected([prompts[i] for i in some]))
        return [found[i] for i in range(len(asks))]

    def _batches(self, prompts, what):                    # like lengths together
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        return tqdm([order[i:i + self.batch] for i in range(0, len(order), self.batch)], desc=what, delay=5)

    def _check_length(self, what, prompts, more=0):
        most, longest = getattr(self.model.config, "max_position_embeddings", None) or math.inf, max(map(len, prompts), default=0) + more
        if longest > most: raise ValueError(f"LocalLMExplainer.{what}: a prompt of {longest} tokens, the model reads {most}; expected fewer or shorter fragments, or a model that reads more")

    def _plain(self, text):                               # special tokens spelt so that the tokenizer reads them as text
        for special in {t.content for t in self.tok.added_tokens_decoder.values() if t.special}: text = text.replace(special, f"{special[0]} {special[1:]}")
        return text

    def _text(self, messages):                            # -> the prompt, up to where the answer begins
        messages = [m | dict(content=self._plain(m["content"])) for m in messages]
        if self.tok.chat_template: return self.tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        return "".join(m["content"] + ("\n\n" if m["role"] == "assistant" else "\n") for m in messages)

    def _ids(self, text):                                 # a chat template writes its own BOS
        begin = [] if self.tok.chat_template or self.tok.bos_token_id is None else [self.tok.bos_token_id]
        return begin + self.tok(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _prompt(self, explanation, tokens):               # -> ids; slots: the position before each `unknown`
        "Piece by piece, for many tokenizers would make one token of the tab and the `un` of `unknown`."
        ids, slots, (unknown,) = self._ids(self._text(simulate_messages(explanation))), [], _after(self.tok, "\t", ["unknown"])
        starts = [self._plain(_escape(t)) + "\t" for t in tokens]
        for start in _after(self.tok, "\n", starts[:1]) + _after(self.tok, "unknown", ["\n" + s for s in starts[1:]]):
            ids = ids + start + self.common
            slots.append(len(ids) - 1)
            ids = ids + unknown[len(self.common) * (unknown[:len(self.common)] == self.common):]
        return ids, slots

    def _expected(self, prompts):                         # [(ids, slots)] -> [[0..10 for each slot]]
        logits, ones = self._branched(prompts) if self.branching else (self._unbranched(prompts), None)
        out = []
        for b, (ids, slots) in enumerate(prompts):
            p = logits[b][:, self.numbers].softmax(-1)                                                 # [slots, 11], or [slots, 10] of digits
            if self.zero is not None:
                ten = p[:, 1] * (ones[b].softmax(-1) if self.branching else self._plain_ones(ids, slots))[:, self.zero]
                p = torch.cat([p[:, :1], (p[:, 1] - ten)[:, None], p[:, 2:], ten[:, None]], 1)
            out.append((p @ torch.arange(11.)).tolist())
        return out

    def _unbranched(self, prompts):                       # -> for each prompt [slots, vocabulary]
        ids, there = _pad([ids for ids, _ in prompts])
        return self._forward(ids, [slots for _, slots in prompts], attention_mask=there)

    def _branched(self, prompts):                         # -> the same; and after one more "1"
        width = max(len(ids) for ids, _ in prompts)
        ids, mask, positions = _branches(prompts, width, self.numbers[1], self.model.dtype)
        logits = self._forward(ids, [slots + list(range(width, width + len(slots))) for _, slots in prompts], attention_mask=mask, position_ids=positions)
        return zip(*(x.chunk(2) for x in logits))

    def _plain_ones(self, ids, slots):                    # -> probabilities after one more "1" [slots, vocabulary], a pass for each
        return next_probs(self.model, [ids[:s + 1] + [self.numbers[1]] for s in slots], batch=self.batch)

    def _forward(self, ids, at, **inputs):                # at: positions wanted of each row -> [float logits of them]
        keep = torch.tensor(sorted({p for row in at for p in row}))                                   # logits are dear: only where some row needs them
        where = lambda t: t.to(self.model.device)
        with _evaluating(self.model): logits = self.model(input_ids=where(ids), use_cache=False, logits_to_keep=where(keep), **{k: where(v) for k, v in inputs.items()}).logits
        return [logits[b, where(torch.searchsorted(keep, torch.tensor(row)))].float().cpu() for b, row in enumerate(at)]

    def _try_branches(self, prompt):
        "Whether a masked pass says the same as plain ones after the first and last slot: at most 0.001 of the probability elsewhere, 0.1 in half precision."
        if prompt is None or self.zero is None or self.branching is False or len(prompt[0]) <= self.tried: return
        (ids, slots), self.branching, self.tried = prompt, False, len(prompt[0])
        try: _, (ones,) = self._branched([prompt])
        except torch.OutOfMemoryError: raise
        except (RuntimeError, ValueError, TypeError, IndexError): return
        elsewhere = (ones[[0, -1]].softmax(-1) - self._plain_ones(ids, [slots[0], slots[-1]])).abs().sum(-1) / 2
        self.branching = bool((elsewhere < (1e-3 if self.model.dtype == torch.float32 else .1)).all())

def _after(tok, before, texts):  # -> the ids of each text as it goes on after `before`, where that keeps its own ids; else as it stands alone
    if not texts: return []
    (head, *whole), alone = (tok(some, add_special_tokens=False, verbose=False)["input_ids"] for some in ([before] + [before + t for t in texts], list(texts)))
    return [ids[len(head):] if ids[:len(head)] == head else other for ids, other in zip(whole, alone)]

def _number_ids(tok):            # -> ids in front of every number; the id of each of 0..10 (or 0..9); the id that makes "10" of "1", or None
    all_ids = _after(tok, "\t", [str(n) for n in range(11)])
    common = os.path.commonprefix(all_ids)
    ids = [ids[len(common):] for ids in all_ids]
    zero = ids.pop()[1] if len(ids[10]) == 2 and ids[10][:1] == ids[1] else None
    if any(len(i) != 1 for i in ids) or len({*map(tuple, ids)}) < len(ids) or tok.unk_token_id is not None and [tok.unk_token_id] in ids:
        raise ValueError(f"LocalLMExplainer: the tokenizer writes 0..10 as {[tok.convert_ids_to_tokens(i) for i in all_ids]}; expected one token of its own for each of 0..9, and \"10\" or \"1\", \"0\" for 10")
    return common, [i for (i,) in ids], zero

def _pad(rows, side="right"):    # -> ids [n, longest], attention mask [n, longest]
    fill = lambda some: torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in some], batch_first=True, padding_side=side)
    return fill(rows), fill([[1] * len(row) for row in rows])

def _branches(prompts, width, one, dtype):      # [(ids, slots)] -> ids [n, w], mask [n, 1, w, w] to add to the attention scores, positions [n, w]; w = width + most slots
    "Behind each prompt a \"1\" for each of its slots, which stands right after the slot and sees the prompt up to there, and itself."
    w = width + max(len(slots) for _, slots in prompts)
    ids, positions, sees = torch.zeros(len(prompts), w, dtype=torch.long), torch.arange(w).clamp(max=width - 1).repeat(len(prompts), 1), torch.eye(w, dtype=torch.bool).repeat(len(prompts), 1, 1)
    sees[:, :width, :width] |= torch.ones(width, width, dtype=torch.bool).tril()
    for b, (row, slots) in enumerate(prompts):
        new = slice(width, width + len(slots))
        ids[b, :len(row)], ids[b, new], positions[b, new] = torch.tensor(row), one, torch.tensor(slots) + 1
        sees[b, new, :width] = torch.arange(width) <= torch.tensor(slots)[:, None]
    return ids, torch.zeros(sees.shape, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)[:, None], positions

# ---- a model behind an address (a module of its own, if one of 250 lines is wanted: from here it needs only the prompts above, the two checks and _phrase)
@dataclass
class _Ask:
    label: str                   # names it in errors
    request: dict                # for chat.completions.create
    read: callable               # what is kept of an answer -> its meaning; ValueError where it has none
    out: int                     # tokens of an answer, about
    name = property(lambda self: hashlib.sha256(json.dumps(self.request, sort_keys=True).encode()).hexdigest() + ".json")

@dataclass
class _Trouble:
    kind: str                    # "wait": again later, then give all up; "answer": again, then give this one up; "stop": give all up
    says: str
    after: float = 0.            # seconds the endpoint wants us to wait

class APIExplainer:
    """Explain and simulate with any OpenAI-compatible chat endpoint. The key is $OPENAI_API_KEY, read when a call is made, and nothing of ours keeps or shows it.
    Each answer is one file in `cache`, named by the sha256 of the whole request (model, messages, parameters) and not of the address: a notebook replays with no network, no key and no base_url.
    For another server that gives its model the same name, take another folder.
    `way` says how the last simulate() read its numbers: "log-probabilities", the expectation over the alternatives 0..10 where each number is written, if every answer has them
    (digits split: after a written "1" the next token tells P("0" | "1"); before any other digit P("1") counts as 1); else "numbers as written"."""
    LONGEST, BAD_ANSWERS = 120., 2            # seconds we wait before we ask again; times a useless answer is asked again

    def __init__(self, model: str,
                 base_url: str | None = None,             # None: $OPENAI_BASE_URL, or OpenAI's own
                 cache: str = "explainer_cache",          # a folder
                 max_concurrency: int = 4,                # requests under way at once, at most
                 retries: int = 5,                        # after 429, 5xx, time-outs and lost connections
                 timeout: float = 60.,                    # seconds
                 price: tuple | None = None,              # dollars for 1M tokens in, and out
                 backoff: float = 1.,                     # seconds before the first retry, twice as many before each next one
                 top_logprobs: int = 20,                  # 0: do not ask for log-probabilities, which some endpoints refuse
                 **params):                               # of the request: max_completion_tokens=2000, seed=0, ...; None leaves one out
        if max_concurrency < 1 or retries < 0: raise ValueError(f"APIExplainer: max_concurrency={max_concurrency}, retries={retries}; expected at least 1, and at least 0")
        if wrong := {"extra_headers", "extra_query", "stream"} & set(params): raise ValueError(f"APIExplainer: got {', '.join(sorted(wrong))}; expected what may lie in the cache, and no stream")
        self.model, self.base_url, self.cache, self.max_concurrency, self.retries, self.timeout, self.price = model, base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1", Path(cache), max_concurrency, retries, timeout, price
        self.backoff, self.top_logprobs, self.params, self.way = backoff, top_logprobs, params, None

    host = property(lambda self: urlsplit(self.base_url).netloc.rpartition("@")[2])
    def __repr__(self): return f"APIExplainer({self.model!r} at {self.host}, cache={str(self.cache)!r})"

    def explain(self, features: list) -> list:            # for each feature its fragments -> one phrase each
        "What each feature fires on."
        return self._answers("explain", self._explain_asks(features))

    def simulate(self, asks: list) -> list:               # [(explanation, tokens)] -> [[0..10 for each token]]
        "The expected strength at each token."
        found = self._answers("simulate", self._simulate_asks(asks))
        exact = all(expected for _, expected in found)
        self.way = "log-probabilities" if exact else "numbers as written"
        return [expected if exact else written for written, expected in found]

    def estimate(self, features: list = (), asks: list = ()) -> dict:
        "Calls still to make for these, answers in the cache, tokens in and out and dollars (None without a price): about, and without retries."
        return self._estimate(self._explain_asks(features) + self._simulate_asks(asks))

    def _estimate(self, asks):
        every = {ask.name: ask for ask in asks}
        todo = [ask for ask in every.values() if self._kept(ask) is None]
        tokens = sum(len(m["content"].encode()) for ask in todo for m in ask.request["messages"]) // 3, sum(ask.out for ask in todo)       # 3 bytes a token
        return dict(calls=len(todo), cached=len(every) - len(todo), tokens_in=tokens[0], tokens_out=tokens[1], dollars=self.price and sum(n * p / 1e6 for n, p in zip(tokens, self.price)))

    # requests
    def _explain_asks(self, features):
        _check_features("APIExplainer.explain", features)
        return [_Ask(f"feature {i}", self._request(explain_messages(fragments), 100), _read_phrase, 20) for i, fragments in enumerate(features)]

    def _simulate_asks(self, asks):
        _check_asks("APIExplainer.simulate", asks)
        more = dict(logprobs=True, top_logprobs=self.top_logprobs) if self.top_logprobs else {}
        return [_Ask(why, self._request(simulate_messages(why, tokens), len(_lines(tokens).encode()) + 20, **more), lambda answer, n=len(tokens): _read_numbers(answer, n), 4 * len(tokens)) for why, tokens in asks]

    def _request(self, messages, most, **more):
        request = dict(model=self.model, messages=messages, temperature=0, max_tokens=most) | more | self.params
        return {k: v for k, v in request.items() if v is not None}

    # the cache
    def _kept(self, ask):                                 # -> the answer's meaning, or None where there is none that can be used
        try: kept = json.loads((self.cache / ask.name).read_text())
        except (OSError, ValueError): return None
        try: return ask.read(kept["answer"]) if kept["request"] == ask.request else None
        except (ValueError, KeyError, TypeError, IndexError, AttributeError): return None

    def _keep(self, ask, answer):
        self.cache.mkdir(parents=True, exist_ok=True)
        part = self.cache / f"{ask.name}.{os.getpid()}.{threading.get_ident()}.part"
        part.write_text(json.dumps(dict(request=ask.request, answer=answer)))
        part.replace(self.cache / ask.name)

    # the wire
    def _answers(self, what, asks):                       # -> what each answer means
        todo = {ask.name: ask for ask in asks}
        done = {name: kept for name, ask in todo.items() if (kept := self._kept(ask)) is not None}
        n, todo = len(todo), {name: ask for name, ask in todo.items() if name not in done}
        troubles = self._fetch(what, todo, done) if todo else {}
        if not troubles: return [done[ask.name] for ask in asks]
        kind = next((kind for kind in ("stop", "wait") if any(t.kind == kind for t in troubles.values())), "answer")
        says = [f"{todo[name].label[:80]!r}: {t.says}" for name, t in troubles.items() if t.kind == kind]
        raise (ConnectionError if kind == "wait" else ValueError)(f"APIExplainer.{what}: {'; '.join(says[:3])}" + (f"; and {len(says) - 3} more" if len(says) > 3 else "") +
            f". {len(done)} of {n} answers are done and kept in {self.cache}: calling again asks only for the other {n - len(done)}")

    def _fetch(self, what, todo, done):                   # {name: ask}; adds to done -> {name: its trouble}
        stop, troubles, client, cost = threading.Event(), {}, self._client(), self._estimate(todo.values())
        dollars = "" if cost["dollars"] is None else f", about ${cost['dollars']:.2f}"
        print(f"{what}: {cost['calls']} calls to {self.host} ({len(done)} more are in the cache), about {cost['tokens_in']:,} tokens in and {cost['tokens_out']:,} out{dollars}", flush=True)
        with client, tqdm(total=len(todo), desc=what) as bar, ThreadPoolExecutor(self.max_concurrency) as pool:
            try:
                jobs = {pool.submit(self._ask, client, stop, ask): name for name, ask in todo.items()}
                for job in as_completed(jobs):
                    answer, trouble = job.result()
                    if trouble: troubles[jobs[job]] = trouble
                    elif answer is not None: done[jobs[job]] = answer; bar.update()
            finally: stop.set()                           # also for Ctrl-C: what is under way ends and is kept, the rest does not begin
        return troubles

    def _ask(self, client, stop, ask):                    # -> what the answer means, trouble; None, None for one not asked any more
        tried, bounds = Counter(), dict(wait=self.retries, answer=self.BAD_ANSWERS, stop=0)
        while not stop.is_set():
            answer, trouble = self._once(client, ask)
            if not trouble:
                self._keep(ask, answer)
                return ask.read(answer), None
            tried[trouble.kind] += 1
            if tried[trouble.kind] > bounds[trouble.kind]:
                if trouble.kind != "answer": stop.set()
                return None, trouble
            stop.wait(self._delay(tried[trouble.kind], trouble.after))
        return None, None

    def _delay(self, n, after=0.):                        # before the n-th retry: backoff * 2^(n-1), give or take half, and no less than asked for
        return max(after, min(self.LONGEST, self.backoff * 2**(n - 1) * random.Random().uniform(.5, 1.5)))

    def _once(self, client, ask):                         # -> what to keep of the answer, trouble
        "One request. Its errors end here: theirs hold the request, and with it the key."
        import openai
        try: text = _without_key(client.chat.completions.with_raw_response.create(**ask.request).http_response.text)
        except openai.APIStatusError as e: return None, self._refusal(e.status_code, _short(e.response.text), _seconds(e.response.headers.get("retry-after")))
        except openai.APITimeoutError: return None, _Trouble("wait", f"no answer from {self.host} in {self.timeout} s")
        except openai.APIConnectionError: return None, _Trouble("wait", f"no connection to {self.host}, or it was cut")
        except Exception as e: return None, _Trouble("stop", f"{type(e).__name__}: {_short(str(e))}")
        try: answer = _slim(text); ask.read(answer)
        except ValueError as e: return None, _Trouble("answer", str(e))
        return answer, None

    def _refusal(self, status, text, after):
        if (status in (408, 409, 429) or status >= 500) and "insufficient_quota" not in text:
            if after <= self.LONGEST: return _Trouble("wait", f"{self.host} answers {status}: {text}", after)
            return _Trouble("stop", f"{self.host} answers {status} and wants us to wait {after:.0f} s: {text}")
        why = {400: "the endpoint does not take the request" + (" (top_logprobs=0 asks for no log-probabilities)" if "logprob" in text else ""), 401: "the endpoint does not take the key in OPENAI_API_KEY",
               403: f"the key in OPENAI_API_KEY may not use {self.model!r}", 404: f"no model {self.model!r}, or not the address of an API (which often ends in /v1)"}
        return _Trouble("stop", f"{self.host} answers {status}: {why.get(status, 'it refuses')}" + ("" if status == 401 else f": {text}"))

    def _client(self):
        import openai
        if not _key() and not _loopback(urlsplit(self.base_url).hostname): raise ValueError(f"APIExplainer: no key for {self.host}; expected it in the environment, as OPENAI_API_KEY (never in a notebook)")
        if not re.fullmatch(r"[!-~]*", _key()): raise ValueError("APIExplainer: OPENAI_API_KEY holds spaces or letters that no key has; expected the key alone")
        return openai.OpenAI(api_key=_key() or "none", base_url=self.base_url, timeout=self.timeout, max_retries=0)

def _key(): return os.environ.get("OPENAI_API_KEY", "").strip()        # never bound to a name: some tracebacks show those
def _without_key(text): return text.replace(_key(), "[key]") if len(_key()) >= 8 else text      # shorter ones ("none", "EMPTY") are no secrets, but may be words
def _short(text): return (lambda line: line if len(line) <= 200 else line[:200] + " ...")(" ".join(_without_key(text).split()))

def _loopback(host):
    try: return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError: return False

def _seconds(after):             # a Retry-After header: seconds, or a date
    from datetime import datetime, timezone
    from email.utils import parsedate_to_datetime
    try: return max(0., float(after or 0))
    except ValueError: pass
    try: return max(0., (parsedate_to_datetime(after) - datetime.now(timezone.utc)).total_seconds())
    except (ValueError, TypeError): return 0.

# ---- answers
_NUMBERS = {str(n) for n in range(11)}

def _slim(text):                 # a response -> {"text", "tokens": None or [[bytes, {number: probability}]]}
    "What is worth keeping: the answer, and of the alternatives to its tokens the numbers."
    try:
        choice = json.loads(text)["choices"][0]
        content, tokens = choice["message"]["content"], (choice.get("logprobs") or {}).get("content")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError): raise ValueError(f"expected a chat completion, got {_short(text)!r}") from None
    if not isinstance(content, str): raise ValueError(f"expected a text, got {_short(repr(content))}")
    try: tokens = tokens and [[_bytes(t), _alternatives(t)] for t in tokens]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError): tokens = None
    if tokens and b"".join(b for b, _ in tokens) != content.encode(): tokens = None
    return dict(text=content, tokens=tokens and [[len(b), alts] for b, alts in tokens])

def _bytes(token): return bytes(token["bytes"]) if token.get("bytes") is not None else token["token"].encode()

def _alternatives(token):        # -> {number: probability}
    found = Counter()
    for text, lp in {t["token"]: t["logprob"] for t in [token, *token["top_logprobs"]]}.items() if token.get("top_logprobs") else ():
        if text.strip() in _NUMBERS: found[text.strip()] += math.exp(lp)
    return found

def _read_phrase(answer):
    phrase = _phrase(answer["text"])
    if not phrase: raise ValueError(f"expected a phrase, got {_short(answer['text'])!r}")
    return phrase

def _read_numbers(answer, n):    # -> [n] as written; [n] expected, or None without log-probabilities
    "The last field of each line; blank lines, ``` and thoughts do not count."
    text, found = answer["text"], []
    for line in re.compile(r"[^\n]+").finditer(text, text.rfind("</think>") + 8 if "</think>" in text else 0):
        if not line[0].strip() or line[0].startswith("```") and "\t" not in line[0]: continue
        number = re.fullmatch(r"(?:.*\t)? *(\d+(?:\.\d+)?)\s*", line[0])
        if not number or float(number[1]) > 10: raise ValueError(f"expected a token, a tab and a number 0..10 on each line, got {_short(line[0])!r}")
        found.append((len(text[:line.start() + number.start(1)].encode()), number[1]))
    if len(found) != n: raise ValueError(f"expected {n} lines, got {len(found)}: {_short(text)!r}")
    expected = [_expectation(answer["tokens"], text.encode(), at, number) for at, number in found] if answer["tokens"] else [None]
    return [float(number) for _, number in found], None if None in expected else expected

def _expectation(tokens, text, at, number):      # the number written at a byte of the text -> mean of 0..10, or None where its alternatives are not known
    starts = list(accumulate((size for size, _ in tokens), initial=0))
    i = bisect_right(starts, at) - 1
    written = text[starts[i]:starts[i + 1]].decode(errors="ignore").strip()
    if written != number and (written, number) != ("1", "10"): return None
    p = Counter(tokens[i][1])
    if written == "1" and i + 1 < len(tokens): p.update({"10": p["1"] * tokens[i + 1][1].get("0", 0.), "1": -p["1"] * tokens[i + 1][1].get("0", 0.)})
    return sum(int(k) * v for k, v in p.items()) / p.total() if p.total() > 0 else None
