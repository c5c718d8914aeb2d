"""Find, test and use the features inside language models; names load their module when used."""

__version__ = "0.1.0"

_HOMES = {
    "model.hub": "load_lm",
    "model.text": "Text load_text pack",
    "model.run": "lm_loss",
    "model.sites": "capture intervene sites",
    "dictionary.base": "Dictionary Feature Lens random_directions fvu",
    "dictionary.codebook": "Codebook",
    "dictionary.bottleneck": "CodebookModel add_codebooks",
    "dictionary.finetune": "finetune",
    "dictionary.train": "train_sae",
    "dictionary.formats": "load_sae save_sae export_sae",
    "dictionary.share": "push_saes",
    "dictionary.harvest": "harvest",
    "dictionary.store": "open_activations",
    "score.metrics": "measure loss_recovered",
    "claims": "claim",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}
__all__ = sorted(_HOME)


def __getattr__(name):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__():
    return [*globals(), *__all__]
