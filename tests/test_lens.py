"A dictionary at a site of a model; a new kind in ten lines, which everything works with."

from collections import Counter

import pytest
import torch
from test_sites import CONFIGS, D, V, hooks
from transformers import AutoModelForCausalLM

from codebook_tutorial.core import seeded
from codebook_tutorial.dictionary.base import Dictionary, Feature, Lens, basis
from codebook_tutorial.dictionary.bottleneck import add_codebooks
from codebook_tutorial.dictionary.codebook import Codebook
from codebook_tutorial.dictionary.codelens import CodeLens, aligned
from codebook_tutorial.feature.ablate import check_tree
from codebook_tutorial.feature.patch import patch_curve
from codebook_tutorial.feature.read import best_features, strong_contexts
from codebook_tutorial.feature.trace import causal_tree
from codebook_tutorial.model.sites import capture, intervene
from codebook_tutorial.model.text import Text
from codebook_tutorial.world.tasks import Pairs

BOS, PAD = 1, 0


class Longer(Dictionary):
    "A new kind: read along unit vectors, written along longer ones."

    def __init__(self, d, n):
        super().__init__()
        self.register_buffer("directions", torch.randn(n, d, generator=seeded(0)))
        self.register_buffer("reads", self.directions / self.directions.norm(dim=1, keepdim=True))

    def encode(self, x):
        return (x @ self.reads.T).relu()


@pytest.fixture
def neox():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS["gpt_neox"]).eval()


def some_text(rows=8, length=24):
    ids = torch.randint(2, V, (rows, length), generator=seeded(0))
    ids[:, 0] = BOS
    ids[::2, -3:] = PAD
    return Text(ids, BOS, PAD)


def states_at(model, site, ids):
    with torch.no_grad(), capture(model, site) as acts:
        model(input_ids=ids)
    return acts[site]


def test_a_feature_is_a_tuple_with_names():
    feature = Feature("resid.1", 17)
    assert feature == ("resid.1", 17) and feature.site == "resid.1" and feature.id == 17
    assert {feature: 1}["resid.1", 17] == 1


def test_a_dictionary_says_what_its_features_are_called():
    assert basis(D).label(17) == "feature 17"
    assert Codebook(D, 10, groups=4).label(37) == "group 3, code 7"


@pytest.mark.parametrize("dictionary", [Longer(D, 20), Codebook(D, 20, k=2)])
def test_the_dictionary_chooses_the_lens(neox, dictionary):
    lens = Lens(neox, "resid.1", dictionary)
    assert type(lens) is (CodeLens if isinstance(dictionary, Codebook) else Lens)
    x = states_at(neox, "resid.1", some_text().ids)
    with torch.no_grad():
        f = lens.acts(x)
        assert torch.equal(f[..., [3, 1]], lens.acts(x, torch.tensor([3, 1])))
        ids, values = lens.sparse(x)
        again = torch.zeros_like(f).scatter_add(-1, ids, values)
    assert torch.equal(again, f) and len(f[0, 0]) == 20


def test_some_places_are_read_sparsely(neox):
    x = states_at(neox, "resid.1", some_text().ids)
    where = torch.rand(x.shape[:-1], generator=seeded(1)) < 0.5
    for dictionary in (Longer(D, 20), Codebook(D, 20, k=3, select="residual")):
        lens = Lens(neox, "resid.1", dictionary)
        with torch.no_grad():
            ids, values = lens.sparse(x, where)
            assert len(ids) == where.sum()
            found = torch.zeros(len(ids), 20).scatter_add(-1, ids, values)
            assert torch.allclose(found, lens.acts(x)[where].clamp(max=found.max()), atol=1e-5)


def test_ids_that_are_not_there_are_refused(neox):
    with pytest.raises(ValueError, match="resid.1 has features 0 to 19, got 3 to 20"):
        Lens(neox, "resid.1", Longer(D, 20)).take_out([3, 20])


def test_what_is_put_in_is_written(neox):
    dictionary, text = Longer(D, 20), some_text()
    lens, x = Lens(neox, "resid.1", dictionary), states_at(neox, "resid.1", some_text().ids)
    want = x + 2 * dictionary.directions[3] - dictionary.directions[5]
    with lens.editing(lens.put_in([3, 5], [2.0, -1.0])):
        assert torch.allclose(states_at(neox, "resid.1", text.ids), want, atol=1e-5)
    assert torch.allclose(lens.put_in(4, 0.5)(x), x + 0.5 * dictionary.directions[4], atol=1e-5)
    rows = torch.arange(8.0)[:, None, None]
    each = lens.put_in(4, rows)(x)
    assert torch.allclose(each, x + rows * dictionary.directions[4], atol=1e-5) and not hooks(neox)


def test_codes_are_put_into_the_models_own_book(neox):
    coded, text = add_codebooks(neox, "mlp.0", n_codes=12, k=3, groups=2).eval(), some_text()
    book = coded.codebooks["mlp.0"]
    lens = Lens(coded, "mlp.0", book)
    with torch.no_grad():
        coded(input_ids=text.ids)
        before = coded.ids["mlp.0"].clone()
        with lens.editing(lens.put_in([5, 7, 12 + 2])):
            coded(input_ids=text.ids)
    after = coded.ids["mlp.0"]
    assert (after[..., 0, 2] == 5).all() and (after[..., 0, 1] == 7).all()
    assert (after[..., 1, 2] == 2).all() and torch.equal(after[..., 0], before[..., 0])
    with pytest.raises(ValueError, match="at most 3 codes in a group, got 4"):
        lens.put_in([0, 1, 2, 3])


def test_codes_of_another_book_are_added_as_vectors(neox):
    book, text = Codebook(D, 12, k=2).eval(), some_text()
    lens, x = Lens(neox, "resid.1", book), states_at(neox, "resid.1", text.ids)
    ids = book.choose(x)
    new = ids.clone()
    new[..., -1] = 4
    want = x + book.decode_ids(new) - book.decode_ids(ids)
    with lens.editing(lens.put_in(4)):
        assert torch.allclose(states_at(neox, "resid.1", text.ids), want, atol=1e-5)
    shifted = lens.shift(lens.put_in(4), strength=2.0)(x)
    assert torch.allclose(shifted, 2 * want - x, atol=1e-5)


def test_all_differences_together_turn_one_pass_into_the_other(neox):
    text = some_text()
    x, y = states_at(neox, "resid.1", text.ids[:4]), states_at(neox, "resid.1", text.ids[4:])
    book = Codebook(D, 12, k=3, groups=2).eval()
    for dictionary in (basis(D), book):
        lens = Lens(neox, "resid.1", dictionary)
        found = lens.difference(lens.seen(x), lens.seen(y))
        edit = found.edit(torch.ones(1, 4, len(found.features), dtype=torch.bool))[0]
        decoded = book.decode_ids(book.choose(y)) - book.decode_ids(book.choose(x))
        assert torch.allclose(edit, y - x if dictionary is not book else decoded, atol=1e-5)
        there = torch.zeros(4, 24, dtype=torch.bool)
        there[:, :3] = True
        some = lens.difference(lens.seen(x), lens.seen(y), there)
        assert not some.edit(some.active[None])[0, :, 3:].any()


def test_codes_in_another_order_are_no_difference():
    a = torch.tensor([[1, 2, 3], [5, 5, 7], [1, 1, 2], [4, 4, 9]])
    b = torch.tensor([[3, 4, 1], [7, 5, 6], [2, 1, 1], [4, 8, 4]])
    assert aligned(a, b).tolist() == [[1, 4, 3], [5, 6, 7], [1, 1, 2], [4, 4, 8]]
    draw = seeded(0)
    a, b = (torch.randint(4, (200, 5), generator=draw) for _ in range(2))
    c = aligned(a, b)
    assert torch.equal(c.sort(-1).values, b.sort(-1).values)
    for x, y in zip(a, c):
        assert (x != y).sum() == 5 - (Counter(x.tolist()) & Counter(y.tolist())).total()


def test_a_new_kind_is_read_and_taken_out(neox):
    dictionary, text = Longer(D, 20), some_text()
    lens = Lens(neox, "resid.1", dictionary)
    f = lens.read(text)
    with intervene(neox, {"resid.1": lens.take_out(3)}):
        gone = lens.read(text, 3)[..., 0]
    assert gone.max() < 1e-4 * f[..., 3].max() and not f[~text.mask].any()


def test_a_new_kind_is_patched(neox):
    base = torch.randint(2, V, (6, 7), generator=seeded(0))
    target, last = base.clone(), torch.full((6,), 6)
    target[:, 2] = (base[:, 2] + 1) % V
    answers = torch.ones(6, 1, dtype=torch.long)
    pairs = Pairs(base, target, last, answers, answers + 1)
    curve = patch_curve(neox, "resid.1", Longer(D, 20), pairs=pairs, n_feats=3, check=False)
    assert curve.kl.shape == (4, 3) and len(curve.features) == 3 and curve.edit[1:].min() > 0


def test_a_new_kind_has_a_tree(neox):
    dictionaries = {"resid.0": Longer(D, 20), "resid.1": Longer(D, 20)}
    text = some_text(16)
    f = Lens(neox, "resid.1", dictionaries["resid.1"]).read(text)
    root = int(f.mean((0, 1)).argmax())
    truth = f[..., root] > 0.5 * f[..., root].max()
    found = best_features(
        neox, "resid.1", dictionaries["resid.1"], text=text, truths={"own": truth}
    )["own"]
    assert torch.equal(found.acts, f[..., found.feature].clamp(min=0))
    contexts = strong_contexts(text, f[..., root], 6)
    tree = causal_tree(neox, dictionaries, ("resid.1", root), contexts=contexts, least=0.0)
    assert all(isinstance(node, Feature) for node in tree.nodes) and len(tree.nodes) > 1
    checked = check_tree(neox, dictionaries, tree, contexts=contexts, draws=1)
    assert checked["root"]["act"] < 1e-4 * checked["clean"]["act"] and checked["below"]["edit"] > 0


def test_any_module_may_be_loaded_first():
    import subprocess
    import sys

    for module in ("base", "codebook", "codelens", "bottleneck"):
        code = (
            f"import codebook_tutorial.dictionary.{module}\n"
            "from codebook_tutorial.dictionary.base import Lens\n"
            "from codebook_tutorial.dictionary.codebook import Codebook\n"
            "print(type(Lens(None, 'resid.0', Codebook(8, 4))).__name__)"
        )
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.stdout.strip() == "CodeLens", ran.stderr
