"""What a recovery takes is estimated from counts, by stage."""

from dataclasses import replace

from lrbo.recovery.memory import ADAM, WIDE, Sizes, needs

TOTAL, MATRICES, UPDATES = 3_000, 2_800, 100
SIZES = Sizes(
    dense=10, compressed=5, trained={-1: 1_000, 0: 2_000}, windows=8, weighed=2, tokens=16,
    features=4, inside=20, blocks=2, vocabulary=50, itemsize=4,
    batches={"blocks": 2, "distill": 4, "adapter": 4, "mixed_rank": 8},
    matrices=MATRICES, updates=UPDATES,
)  # fmt: skip
STATES, ACTIVATIONS = "gradients and optimizer", "activations of a step"


def test_adapters_have_the_states_of_what_they_train() -> None:
    whole, small = needs(SIZES, ["distill"], 0), needs(SIZES, ["adapter"], 0)
    assert whole[STATES] == TOTAL * ADAM
    assert small[STATES] == UPDATES * ADAM + (TOTAL + MATRICES) * WIDE < whole[STATES]
    assert small[ACTIVATIONS] == whole[ACTIVATIONS]


def test_two_passes_have_twice_the_activations() -> None:
    whole, mixed = needs(SIZES, ["distill"], 0), needs(SIZES, ["mixed_rank"], 0)
    assert mixed[STATES] == whole[STATES]
    assert mixed[ACTIVATIONS] == 2 * whole[ACTIVATIONS]


def test_stages_one_after_the_other_take_what_the_largest_takes() -> None:
    each = [needs(SIZES, [name], 0) for name in SIZES.batches]
    together = needs(SIZES, [*SIZES.batches], 0)
    for part in (STATES, ACTIVATIONS):
        assert together[part] == max(one[part] for one in each)
    larger = replace(SIZES, updates=10 * UPDATES)
    assert needs(larger, ["adapter"], 0)[STATES] > each[2][STATES]
