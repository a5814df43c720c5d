"""Which runs each experiment of the paper needs, and how much of the paper's budget they get here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paper.runs import Run
from torch_sap.decide.groups import Scope

# The paper trains 200 epochs a round, 30 rounds, ResNets 15. What a CPU can do is less, and the page says so.
CIFAR10 = Run(model="cnn", data="cifar10", width=16, rounds=8, epochs=3)
REDUCED = {
    ("mlp", "fashion-mnist"): Run(model="mlp", rounds=30, epochs=10),
    ("cnn", "fashion-mnist"): Run(
        model="cnn", width=16, rounds=8, epochs=2, images=2000, test_images=2000, batch_size=50, ratio=0.3
    ),
    ("test_resnet", "fashion-mnist"): Run(
        model="test_resnet", rounds=8, epochs=2, images=1500, test_images=2000, batch_size=50, ratio=0.3
    ),
    ("cnn", "cifar10"): CIFAR10,
}
PAPER_ROUNDS, PAPER_ROUNDS_RESNET, PAPER_EPOCHS = 30, 15, 200
ABLATION = Run(model="mlp", rounds=12, epochs=3, images=20_000)
ANCHORS = Run(model="mlp", rounds=10, epochs=5)
# Experiments with a budget of their own.
ADAPTIVE = Run(model="mlp", rounds=7, epochs=5)
BASES = {
    "adaptive": ADAPTIVE,
    "settings": ADAPTIVE,
    "cifar10": CIFAR10,
    "anchors": ANCHORS,
    "differences": ANCHORS,
    "figure4": ABLATION,
    "figure5": ABLATION,
}

SEEDS = (0, 1, 2)
FEWER_SEEDS = (0, 1)
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
RANDOM_ROUNDS = 21  # 0.8 ** 21 is less than 1 %
NORMS = ((0.2, 1.0), (0.4, 1.0), (0.5, 1.0), (0.6, 1.0), (0.8, 1.0), (1.0, 1.5), (1.0, 2.0), (1.0, 4.0), (0.5, 2.0))
RATIOS = (0.2, 0.5, 0.7)
DENSE_EPOCHS = 12
DENSE_WIDTHS = (16, 32)
# p and q of the runs that have controls, by scope.
CONTROLLED: dict[Scope, tuple[float, float]] = {"global": (1.0, 2.0), "layer": (0.5, 1.0)}
DECAYS = (0.0, 5e-4)
ETA_R = (0.0, 0.001, 0.01, 0.1, 1.0)
GAMMA = (1.0, 3.0, 5.0, 7.0)


def paper_budget(model: str) -> Run:
    """The paper's own budget for a model."""
    rounds = PAPER_ROUNDS_RESNET if "resnet" in model else PAPER_ROUNDS
    return Run(model=model, rounds=rounds, epochs=PAPER_EPOCHS)


def figure2(base: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """SAP (0.5, 1), SAP (1, 2), Lottery Ticket and One Shot in the global scope."""
    methods = [
        replace(base, method="sap"),
        replace(base, method="sap", p=1.0, q=2.0),
        replace(base, method="lottery-ticket"),
        replace(base, method="one-shot"),
    ]
    return _seeded(methods, seeds)


def figure3(base: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """SAP in its three scopes, Lottery Ticket and One Shot."""
    methods = [replace(base, method="sap", scope=scope) for scope in ("neuron", "layer", "global")]
    return _seeded([*methods, replace(base, method="lottery-ticket"), replace(base, method="one-shot")], seeds)


def figure4(base: Run, seeds: Sequence[int] = FEWER_SEEDS) -> list[Run]:
    """SAP with other p and q, global scope."""
    return _seeded([replace(base, method="sap", p=p, q=q) for p, q in NORMS], seeds)


def figure5(base: Run, seeds: Sequence[int] = FEWER_SEEDS) -> list[Run]:
    """SAP with other eta_r and gamma, global scope."""
    changed = [replace(base, method="sap", eta_r=eta_r) for eta_r in ETA_R]
    changed += [replace(base, method="sap", gamma=gamma) for gamma in GAMMA[1:]]
    return _seeded(changed, seeds)


def audit(base: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """All methods at equal epochs a round, plain pruning at once to the densities of the table, and EMP."""
    runs = list(dict.fromkeys([*figure2(base, seeds), *figure3(base, seeds)]))
    random = [replace(base, method="random", rounds=min(base.rounds, RANDOM_ROUNDS))]
    reached = [density for density in DENSITIES if density >= (1 - base.ratio) ** base.rounds]
    plain = [replace(base, method="plain", rounds=1, ratio=1 - density) for density in reached]
    added = [*_seeded(random, seeds), *_seeded(plain, seeds), *emp(base, seeds)]
    return sorted([*runs, *added], key=lambda run: run.seed)


def emp(base: Run, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """Keeping the effective number of weights once, and training on from there, for as long as before.

    Source: "Effective Model Pruning", arXiv 2509.25606, with magnitudes as scores.
    """
    return _seeded([replace(base, method="sap", p=1.0, q=2.0, rounds=1, rewind="none")], seeds)


def adaptive(base: Run = ADAPTIVE, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """SAP beside its controls, other scopes, ratios and rewinding; in one seed dense training."""
    runs = [run for seed in seeds for run in controls(base, seed, seeds)]
    runs += [run for seed in seeds for run in (*scopes(base, seed), *tuned(base, seed))]
    return [*runs, *dense(base, seeds[:1])]


def cifar10(base: Run = CIFAR10, seeds: Sequence[int] = FEWER_SEEDS) -> list[Run]:
    """Every method on CIFAR-10 in the first seed, SAP (1, 2) in all scopes; in the others it and Lottery Ticket.

    In the global scope SAP (1, 2) is followed by its controls, a replay by that of another seed. Dense training, in the
    first seed, is that of two widths.
    """
    first = replace(base, seed=seeds[0])
    runs = [*figure2(base, seeds[:1]), replace(first, method="random"), *scopes(base, seeds[0]), *emp(base, seeds[:1])]
    runs += [run for run in figure2(base, seeds[1:]) if run.method == "lottery-ticket" or run.p == 1]
    followers = [run for seed in seeds for run in controls(base, seed, seeds)]
    runs += [run for run in followers if run.scope == "global" and run.source is not None]
    return [*runs, *(run for width in DENSE_WIDTHS for run in dense(replace(base, width=width), seeds[:1]))]


def settings(base: Run = ADAPTIVE, seeds: Sequence[int] = SEEDS) -> list[Run]:
    """SAP in every scope, with the paper's two pairs of p and q, on every network that was trained for it."""
    audited = REDUCED["mlp", "fashion-mnist"]
    longer = [replace(audited, method="sap", scope=scope) for scope in ("global", "layer", "neuron")]
    longer.append(replace(audited, method="sap", p=1.0, q=2.0))
    shorter = [run for seed in seeds for run in scopes(base, seed)]
    return [*_seeded(longer, seeds), *shorter, *(run for run in cifar10() if run.method == "sap" and run.rounds > 1)]


def controls(base: Run, seed: int, seeds: Sequence[int]) -> list[Run]:
    """SAP, a fixed ratio that ends at the same size, and SAP's counts from the next seed."""
    following = seeds[(list(seeds).index(seed) + 1) % len(seeds)]
    runs = []
    for scope, (p, q) in CONTROLLED.items():
        sap = replace(base, method="sap", scope=scope, p=p, q=q, seed=seed)
        runs += [sap, replace(sap, method="mean-share", source=seed), replace(sap, method="replay", source=following)]
    return runs


def scopes(base: Run, seed: int) -> list[Run]:
    """SAP (1, 2), which prunes more, in the two scopes that the other experiments show for (0.5, 1) only."""
    return [replace(base, method="sap", p=1.0, q=2.0, scope=scope, seed=seed) for scope in ("layer", "neuron")]


def tuned(base: Run, seed: int) -> list[Run]:
    """Lottery tickets of several ratios, and other ways to rewind."""
    tickets = [replace(base, method="lottery-ticket", ratio=ratio, seed=seed) for ratio in RATIOS]
    rewound = [replace(base, method="lottery-ticket", seed=seed), replace(base, method="sap", p=1.0, q=2.0, seed=seed)]
    return [*tickets, *(replace(run, rewind=rewind) for run in rewound for rewind in ("late", "none"))]


def dense(base: Run, seeds: Sequence[int]) -> list[Run]:
    """Training without pruning, with and without weight decay, measured after each epoch."""
    once = replace(base, method="plain", rounds=0, epochs=DENSE_EPOCHS)
    return _seeded([replace(once, weight_decay=decay) for decay in DECAYS], seeds)


def anchors(base: Run = ANCHORS, seeds: Sequence[int] = FEWER_SEEDS) -> list[Run]:
    """The six configurations that the authors' own code was run with."""
    runs = list(dict.fromkeys([*figure2(base, seeds), *figure3(base, seeds)]))
    return sorted(runs, key=lambda run: run.seed)


def differences(base: Run = ANCHORS, seeds: Sequence[int] = FEWER_SEEDS) -> list[Run]:
    """Runs of `anchors` with what the authors' code does in another way, where it can matter."""
    changed = [
        replace(base, method="lottery-ticket", authors="clip"),
        replace(base, method="sap", scope="layer", authors="clip"),
        replace(base, method="sap", scope="neuron", authors="count"),
        replace(base, method="sap", scope="neuron", authors="clip+count"),
    ]
    return _seeded(changed, seeds)


def _seeded(runs: Sequence[Run], seeds: Sequence[int]) -> list[Run]:
    return [replace(run, seed=seed) for seed in seeds for run in runs]
