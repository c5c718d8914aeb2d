"""The two verbs on every family: names, bit-equality, order, and nothing left behind."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from codebook_tutorial.model.sites import (
    capture,
    from_transformer_lens,
    intervene,
    match_sites,
    site_dims,
    sites,
    to_transformer_lens,
)
from codebook_tutorial.model.structure import blocks_of, structure

D, HEADS, MLP, LAYERS, V = 32, 4, 48, 3, 50
small = dict(vocab_size=V, bos_token_id=0, eos_token_id=None, pad_token_id=None)
llama = dict(
    hidden_size=D,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    intermediate_size=MLP,
    head_dim=16,
    **small,
)
CONFIGS = {
    "gpt2": GPT2Config(n_embd=D, n_layer=LAYERS, n_head=HEADS, n_inner=MLP, **small),
    "gpt_neo": GPTNeoConfig(
        hidden_size=D,
        num_layers=LAYERS,
        num_heads=HEADS,
        intermediate_size=MLP,
        attention_types=[[["global", "local", "global"], 1]],
        **small,
    ),
    "gpt_neox": GPTNeoXConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        **small,
    ),
    "gpt_neox_serial": GPTNeoXConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        use_parallel_residual=False,
        **small,
    ),
    "llama": LlamaConfig(**llama),
    "mistral": MistralConfig(**llama),
    "qwen2": Qwen2Config(**{k: v for k, v in llama.items() if k != "head_dim"}),
    "qwen3": Qwen3Config(**llama),
    "gemma": GemmaConfig(**llama),
    "gemma2": Gemma2Config(query_pre_attn_scalar=16, **llama),
    "gemma3": Gemma3TextConfig(query_pre_attn_scalar=16, **llama),
}
IDS = torch.randint(1, V, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=CONFIGS)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[family]).eval()


@pytest.fixture
def neox():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]).eval()


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_identity_interventions_leave_logits_bit_equal(model):
    with torch.no_grad():
        before = model(IDS).logits
        with intervene(model, {"*": lambda x: x.clone()}):
            assert torch.equal(model(IDS).logits, before)
        with intervene(model, {"*": lambda x: None}):
            assert torch.equal(model(IDS).logits, before)
    assert hooks(model) == 0


def test_heads_through_the_output_projection_are_attn(model, family):
    with capture(model, "*") as acts, torch.no_grad():
        model(IDS)
    for i, (block, places) in enumerate(zip(blocks_of(model), structure(model).places)):
        out = block.get_submodule(places["heads"].path)(acts[f"heads.{i}"])
        if family in ("gemma2", "gemma3"):
            out = block.post_attention_layernorm(
                out
            )  # the norm's output is what reaches the stream
        assert torch.equal(out, acts[f"attn.{i}"])
        down = block.get_submodule(places["neurons"].path)(acts[f"neurons.{i}"])
        if family in ("gemma2", "gemma3"):
            down = block.post_feedforward_layernorm(down)
        assert torch.equal(down, acts[f"mlp.{i}"])
        out = block.mlp(acts[f"mlp_in.{i}"])
        if family in ("gemma2", "gemma3"):
            out = block.post_feedforward_layernorm(out)
        assert torch.equal(out, acts[f"mlp.{i}"])


def test_a_block_is_two_additions(model):
    with capture(model, "*") as acts, torch.no_grad():
        model(IDS)
    for i in range(1, LAYERS):
        assert torch.allclose(
            acts[f"resid.{i - 1}"] + acts[f"attn.{i}"] + acts[f"mlp.{i}"],
            acts[f"resid.{i}"],
            atol=1e-5,
        )


def test_resid_stands_before_the_final_norm(model):
    with capture(model, "resid.*") as acts, torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    assert torch.equal(acts["resid.0"], states[1])
    assert not torch.allclose(
        acts[f"resid.{LAYERS - 1}"], states[-1]
    )  # transformers' last one is after the norm


def test_widths(model, family):
    dims = site_dims(model)
    assert dims["resid.1"] == dims["attn.1"] == dims["mlp.1"] == D and dims["neurons.1"] == MLP
    assert dims["heads.1"] == (
        64 if family in ("llama", "mistral", "qwen3", "gemma", "gemma2", "gemma3") else D
    )
    assert set(dims) == set(sites(model)) and len(sites(model)) == 6 * LAYERS
    assert dims["mlp_in.1"] == D


def test_an_intervention_changes_only_what_comes_after(model):
    with torch.no_grad(), capture(model, ["resid.0", "resid.2"]) as acts:
        model(IDS)
        before = dict(acts)
        with intervene(model, {"mlp.1": lambda x: x * 0}):
            model(IDS)
    assert torch.equal(before["resid.0"], acts["resid.0"]) and not torch.equal(
        before["resid.2"], acts["resid.2"]
    )


def test_generate_joins_steps_and_equals_one_plain_pass(model):
    with capture(model, ["resid.1", "heads.0"]) as acts:
        text = model.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    with capture(model, ["resid.1", "heads.0"]) as plain, torch.no_grad():
        model(text[:, :-1])
    for site in acts:
        assert acts[site].shape[1] == text.shape[1] - 1
        assert torch.allclose(acts[site], plain[site], atol=1e-4)


def test_intervene_acts_on_each_step_of_generate(neox):
    lengths = []
    with intervene(neox, {"mlp.0": lambda x: lengths.append(x.shape[1])}):
        neox.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
        )
    assert lengths == [7, 1, 1, 1]


def test_without_cache_the_last_pass_counts(neox):
    with capture(neox, "resid.0") as acts:
        neox.generate(
            IDS,
            attention_mask=torch.ones_like(IDS),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            use_cache=False,
        )
    assert acts["resid.0"].shape[1] == 7 + 2


def test_a_new_pass_starts_afresh(neox):
    with capture(neox, "resid.0") as acts, torch.no_grad():
        neox(IDS)
        neox(IDS[:, :3])
        assert acts["resid.0"].shape == (2, 3, D)
        neox(IDS)  # the default makes a cache that nobody continues
        assert acts["resid.0"].shape == (2, 7, D)


@pytest.mark.parametrize("capture_first", [True, False])
@pytest.mark.parametrize("site", ["mlp.1", "heads.1", "resid.1"])
def test_capture_sees_what_flows_on(neox, capture_first, site):
    fill = {site: lambda x: torch.full_like(x, 2.0)}
    with torch.no_grad():
        if capture_first:
            with capture(neox, site) as acts, intervene(neox, fill):
                neox(IDS)
        else:
            with intervene(neox, fill), capture(neox, site) as acts:
                neox(IDS)
    assert (acts[site] == 2).all()


def test_interventions_nest_in_order(neox):
    with (
        torch.no_grad(),
        intervene(neox, {"mlp.0": lambda x: x * 0 + 1}),
        intervene(neox, {"mlp.0": lambda x: x * 3}),
        capture(neox, "mlp.0") as acts,
    ):
        neox(IDS)
    assert (acts["mlp.0"] == 3).all()


def boom(x):
    raise RuntimeError("boom")


@pytest.mark.parametrize("site", ["resid.0", "heads.2", "neurons.1"])
def test_no_hook_survives_an_exception(neox, site):
    with pytest.raises(RuntimeError, match="boom"):
        with capture(neox, "*"), intervene(neox, {"mlp.*": lambda x: x, site: boom}):
            neox(IDS)
    assert hooks(neox) == 0
    with pytest.raises(KeyError):
        with capture(neox, "*") as acts:
            acts["nothing"]
    assert hooks(neox) == 0


def test_a_bad_site_in_a_list_leaves_no_hook(neox):
    with pytest.raises(
        ValueError, match=r"no site 'mlp.9'; this model has resid.0 to resid.2, attn.0"
    ):
        with intervene(neox, {"mlp.0": lambda x: x, "mlp.9": lambda x: x}):
            pass
    with pytest.raises(ValueError, match="no site 'head.0'"):
        with capture(neox, ["resid.0", "head.0"]):
            pass
    assert hooks(neox) == 0


@pytest.mark.parametrize(
    "bad,got",
    [
        (lambda x: x[..., :3], r"\[2, 7, 3\]"),
        (lambda x: x[0], r"\[7, 32\]"),
        (lambda x: 3.0, "float"),
    ],
)
def test_a_wrong_shape_says_what_was_expected(neox, bad, got):
    with pytest.raises(
        ValueError, match=rf"mlp.1: expected a tensor of shape \[2, 7, 32\], got {got}"
    ):
        with intervene(neox, {"mlp.1": bad}):
            neox(IDS)
    assert hooks(neox) == 0


def test_the_models_dtype_is_kept(neox):
    half = copy.deepcopy(neox).bfloat16()
    with intervene(half, {"mlp.*": lambda x: x.float() * 1.0}), torch.no_grad():
        assert half(IDS).logits.dtype == torch.bfloat16


def test_gradients_on_request(neox):
    with capture(neox, "mlp.0") as acts:
        neox(IDS)
    assert not acts["mlp.0"].requires_grad
    with capture(neox, "mlp.0", grad=True) as acts:
        neox(IDS).logits.sum().backward(inputs=[acts["mlp.0"]])
    assert acts["mlp.0"].grad.abs().sum() > 0


def test_patterns_keep_order_and_do_not_repeat(neox):
    assert match_sites(neox, ["mlp.1", "mlp.*", "heads.0"]) == [
        "mlp.1",
        "mlp.0",
        "mlp.2",
        "heads.0",
    ]
    two = ["resid.2", "attn.2", "mlp.2", "heads.2", "neurons.2", "mlp_in.2"]
    assert match_sites(neox, "*.2") == two


def test_an_unknown_structure_names_the_known_ones():
    with pytest.raises(ValueError, match="no known structure in Linear; expected one of GPT-2"):
        sites(torch.nn.Linear(2, 2))


def test_a_bare_base_model_works_too(neox):
    with capture(neox.base_model, "resid.1") as acts, torch.no_grad():
        neox.base_model(input_ids=IDS)
    assert acts["resid.1"].shape == (2, 7, D)


def test_transformer_lens_names(neox):
    assert to_transformer_lens("resid.3") == "blocks.3.hook_resid_post"
    assert all(from_transformer_lens(to_transformer_lens(s)) == s for s in sites(neox))
    with pytest.raises(ValueError, match="no site for 'blocks.0.hook_q'"):
        from_transformer_lens("blocks.0.hook_q")
    bridge = [to_transformer_lens(s, bridge=True) for s in sites(neox)]
    assert [from_transformer_lens(name) for name in bridge] == sites(neox)
    assert to_transformer_lens("heads.3", bridge=True) == "blocks.3.attn.o.hook_in"


def test_steps_are_joined_when_the_cache_was_begun_outside(neox):
    with torch.no_grad():
        past = neox(IDS, use_cache=True).past_key_values
    more = torch.cat([IDS, IDS[:, :1]], 1)
    with capture(neox, "resid.0") as acts:
        neox.generate(
            more,
            attention_mask=torch.ones_like(more),
            past_key_values=past,
            max_new_tokens=6,
            min_new_tokens=6,
            do_sample=False,
            pad_token_id=0,
        )
    assert acts["resid.0"].shape[1] == 6
