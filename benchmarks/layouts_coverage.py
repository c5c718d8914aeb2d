"""Which share of the autoencoders in SAELens' table of releases has a layout that we read.

python benchmarks/layouts_coverage.py [pretrained_saes.yaml]
"""

import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import yaml

# SAELens' loaders of layouts that load_sae reads
READ = {
    "sae_lens",
    "connor_rob_hook_z",
    "gemma_2",
    "gemma_3",
    "llama_scope",
    "llama_scope_r1_distill",
    "dictionary_learning_1",
    "deepseek_r1",
    "qwen_scope",
    "goodfire",
    "sparsify",
    "gemma_3 transcoders",
    "gemma_2_transcoder",
    "mwhanna_transcoder",
}


def table_of_saelens() -> Path:
    "The table that ships with the installed SAELens."
    return Path(find_spec("sae_lens").submodule_search_locations[0]) / "pretrained_saes.yaml"


def entries(table: Path) -> Counter:
    "How many autoencoders each loader has; Gemma Scope 2's transcoders by themselves."
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found = Counter()
    for release in loader(table.read_text(encoding="utf-8")).get_single_data().values():
        name = release.get("conversion_func") or "sae_lens"
        for sae in release["saes"]:
            apart = name == "gemma_3" and sae["path"].startswith("transcoder")
            found[f"{name} transcoders" if apart else name] += 1
    return found


def coverage(found: Counter) -> str:
    "The share that is read, and what is left, in a sentence."
    read = sum(n for name, n in found.items() if name in READ)
    left = [f"{name} {n:,}" for name, n in found.most_common() if name not in READ]
    share = f"{read:,} of {found.total():,} ({read / found.total():.1%})"
    return f"{share}; not yet: {', '.join(left) or 'none'}"


if __name__ == "__main__":
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else table_of_saelens()
    print(coverage(entries(file)))
