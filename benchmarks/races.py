"""Who races against whom: contestants of one size, the floor first."""

from typing import NamedTuple

COURSE = "course"  # the course's own environment


class Entry(NamedTuple):
    where: str  # COURSE or a peer of bench.PEERS
    who: str  # of contestants.WHO
    size: dict


def course(who, **size):
    "A contestant of the course's own environment."
    return Entry(COURSE, who, size)


def sizes(quick):
    "Numbers of codes."
    return (1000, 10_000) if quick else (1000, 10_000, 50_000)


def codebook(quick):
    "Every k and C: floor, course, authors' layer and (one code) a library of vector quantisers."
    for C in sizes(quick):
        for k in (1, 8, 100):
            size = dict(N=1024 if quick else 4096, d=512, C=C, k=k)
            race = [course("codebook/floor", **size), course("codebook/course", **size)]
            race.append(Entry("authors", "codebook/authors", size))
            if k == 1:
                peer = "vector-quantize-pytorch"
                race.append(Entry(peer, f"codebook/{peer}", size))
            yield race


def lookup(quick):
    "The nearest of C codes; the floor is faiss."
    for C in sizes(quick):
        for k in (1, 8):
            size = dict(N=4096, d=512, C=C, k=k)
            yield [Entry("faiss", "lookup/faiss", size), course("lookup/course", **size)]


def sae(quick):
    "One race for all kinds: everybody takes turns with everybody."
    size = dict(N=1024 if quick else 4096, d=512, n_feats=2048)
    kinds = ("tied", "untied", "topk", "batchtopk", "jumprelu", "gated", "matryoshka")
    race = [course("sae/floor", **size)]
    for kind in kinds:
        race.append(
            course("sae/course", **size, kind=kind, **(dict(k=32) if "topk" in kind else {}))
        )
    topk = size | dict(kind="topk")
    for peer in ("sae-lens", "dictionary-learning"):
        race.append(Entry(peer, f"sae/{peer}", size | dict(kind="l1")))
        for kind in ("topk", "batchtopk"):
            race.append(Entry(peer, f"sae/{peer}", size | dict(kind=kind, k=32)))
        if peer == "sae-lens":
            dense = dict(use_sparse_activations=False, k=32)
            race.append(Entry(peer, f"sae/{peer}", topk | dense))
    for optimizer in ("signum", "adam"):
        race.append(
            Entry("eai-sparsify", "sae/eai-sparsify", topk | dict(optimizer=optimizer, k=32))
        )
    yield race


def slopes(quick):
    "The course's layer and two autoencoders, one size varied at a time: how seconds grow."
    most = 2 if quick else 4
    grows = dict(N=(1024, 2048, 4096, 8192), C=(1000, 2000, 4000, 8000))
    grows |= dict(k=(1, 8, 32, 100), d=(128, 256, 512, 1024), n_feats=(512, 1024, 2048, 4096))
    base = dict(N=2048, d=256, C=2000, k=1)
    for varied in ("N", "C", "k", "d"):
        sizes = grows[varied][:most]
        yield [course("codebook/course", **base | {varied: size}) for size in sizes]
    for kind in (dict(kind="tied"), dict(kind="topk", k=32)):
        base = dict(N=2048, d=256, n_feats=1024) | kind
        for varied in ("N", "d", "n_feats"):
            sizes = grows[varied][:most]
            yield [course("sae/course", **base | {varied: size}) for size in sizes]


RACES = dict(codebook=codebook, lookup=lookup, sae=sae, slopes=slopes)
