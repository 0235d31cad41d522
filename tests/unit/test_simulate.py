"""The action lists against torch's own, the simulation against a plain event loop, the bounds against both."""

import random
from types import SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torch_schedules
from torch.distributed.pipelining.schedules import get_schedule_class

from autopar.core.errors import UsageError
from autopar.inter.pipeline_bounds import max_in_flight, pipeline_lower_bound_s
from autopar.pipeline.schedule import Action, in_flight_by_rank, rank_actions
from autopar.pipeline.simulate import StageTimes, simulate

TORCH_NAMES = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B"}


def torch_order(schedule: str, num_ranks: int, num_microbatches: int, num_chunks: int) -> list[list[str]]:
    """torch's order of forwards and backwards, from stages that only have the attributes a schedule reads."""
    stages = [
        SimpleNamespace(
            stage_index=index,
            num_stages=num_ranks * num_chunks,
            group_size=num_ranks,
            group_rank=0,
            group=None,
            is_first=index == 0,
            is_last=index == num_ranks * num_chunks - 1,
            submod=None,
            has_backward=True,
            device="cpu",
        )
        for index in range(0, num_ranks * num_chunks, num_ranks)
    ]
    cls = get_schedule_class(TORCH_NAMES[schedule])
    single = schedule != "interleaved"
    made = cls(stages[0] if single else stages, num_microbatches, loss_fn=lambda output, target: output)
    order = made._get_pipeline_order() if single else made.pipeline_order
    ranks = []
    for rank in range(num_ranks):
        names = [action for action in order[rank] if action is not None and action.computation_type.value in ("F", "B")]
        # torch 2.13 numbers the forwards of 1F1B's last rank from 1.
        late = 1 if schedule == "1f1b" and rank == num_ranks - 1 else 0
        ranks.append(
            [
                f"{a.stage_index}{a.computation_type.value}"
                f"{a.microbatch_index - (late if a.computation_type.value == 'F' else 0)}"
                for a in names
            ]
        )
    return ranks


def ours(schedule, num_ranks, num_microbatches, num_chunks):
    return [
        [str(action) for action in rank] for rank in rank_actions(schedule, num_ranks, num_microbatches, num_chunks)
    ]


@pytest.mark.parametrize("num_ranks", [2, 3, 4, 5, 8])
def test_single_stage_orders_are_torchs(num_ranks):
    # torch's 1F1B list is wrong below S micro-batches: it forwards more than there are.
    for num_microbatches in (num_ranks, num_ranks + 1, 2 * num_ranks + 3, 17):
        for schedule in ("1f1b", "gpipe"):
            assert ours(schedule, num_ranks, num_microbatches, 1) == torch_order(
                schedule, num_ranks, num_microbatches, 1
            )


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 8])
def test_interleaved_order_is_torchs(num_ranks):
    for num_chunks in (1, 2, 3, 4):
        for rounds in (1, 2, 3, 5):
            sizes = (num_ranks, num_ranks * rounds, num_chunks)
            assert ours("interleaved", *sizes) == torch_order("interleaved", *sizes)


def test_torch_still_has_the_names_read_here():
    assert torch_schedules._Action.from_str("2F0").stage_index == 2


def test_few_microbatches_run_all_forwards_first():
    assert ours("1f1b", 4, 2, 1)[0] == ["0F0", "0F1", "0B0", "0B1"]


def test_in_flight_is_counted():
    for num_ranks in range(1, 7):
        for num_microbatches in range(1, 10):
            for schedule in ("1f1b", "gpipe"):
                in_flight = in_flight_by_rank(schedule, num_ranks, num_microbatches)
                places = range(num_ranks, 0, -1)
                assert in_flight == tuple(max_in_flight(schedule, num_microbatches, place) for place in places)
            assert in_flight_by_rank("1f1b", num_ranks, num_microbatches) == tuple(
                min(place, num_microbatches) for place in range(num_ranks, 0, -1)
            )
        for num_chunks in (1, 2, 3):
            for rounds in (1, 2, 4):
                total = num_ranks * rounds
                assert in_flight_by_rank("interleaved", num_ranks, total, num_chunks) == tuple(
                    min(2 * (num_ranks - 1 - rank) + (num_chunks - 1) * num_ranks + 1, num_chunks * total)
                    for rank in range(num_ranks)
                )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleaved", 4, 6, 2), "6 is not a multiple of 4"),
        (("1f1b", 4, 6, 2), "1 model chunk"),
        (("1f1b", 4, 0, 1), "at least 1"),
        (("zigzag", 4, 4, 1), "unknown schedule"),
    ],
)
def test_impossible_sizes_are_refused(arguments, message):
    with pytest.raises(UsageError, match=message):
        rank_actions(*arguments)


def test_actions_parse_back():
    for rank in rank_actions("interleaved", 2, 4, 2):
        assert [Action.parse(str(action)) for action in rank] == list(rank)
    with pytest.raises(UsageError):
        Action.parse("2X0")


def plain_times(orders: list[list[str]], stages: list[StageTimes]) -> dict[str, tuple[float, float]]:
    """(start, end) of every action of torch-like lists, by asking each action for the ends it waits for."""
    import re

    where = {name: (rank, index) for rank, order in enumerate(orders) for index, name in enumerate(order)}
    spans: dict[str, tuple[float, float]] = {}
    pending = list(where)
    while pending:
        left = []
        for name in pending:
            stage, kind, number = re.fullmatch(r"(\d+)([FB])(\d+)", name).groups()
            stage, (rank, index) = int(stage), where[name]
            waits = [(orders[rank][index - 1], 0.0)] if index else []
            if kind == "F" and stage > 0:
                waits.append((f"{stage - 1}F{number}", stages[stage - 1].transfer_forward_s))
            if kind == "B" and stage < len(stages) - 1:
                waits.append((f"{stage + 1}B{number}", stages[stage + 1].transfer_backward_s))
            if kind == "B":
                waits.append((f"{stage}F{number}", 0.0))
            if any(other not in spans for other, _ in waits):
                left.append(name)
                continue
            start = max((spans[other][1] + delay for other, delay in waits), default=0.0)
            spans[name] = (start, start + (stages[stage].forward_s if kind == "F" else stages[stage].backward_s))
        assert len(left) < len(pending), "deadlock"
        pending = left
    return spans


def random_stages(rng: random.Random, count: int, transfer: float) -> list[StageTimes]:
    spread = rng.choice([0.0, 0.1, 0.9])
    return [
        StageTimes(
            forward_s=rng.uniform(1 - spread, 1),
            backward_s=rng.choice([0.2, 1, 2]) * rng.uniform(1 - spread, 1),
            step_s=rng.choice([0, 4]) * rng.random(),
            transfer_forward_s=transfer * rng.random(),
            transfer_backward_s=transfer * rng.random(),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_simulation_equals_a_plain_event_loop(schedule):
    rng = random.Random(7)
    for _ in range(150):
        num_ranks, num_chunks = rng.randint(1, 7), 1
        num_microbatches = rng.randint(1, 40)
        if schedule == "interleaved":
            num_chunks, num_microbatches = rng.randint(1, 3), num_ranks * rng.randint(1, 4)
        stages = random_stages(rng, num_ranks * num_chunks, rng.choice([0.0, 0.1, 1.0, 5.0]))
        result = simulate(schedule, stages, num_microbatches, num_chunks)
        spans = plain_times(ours(schedule, num_ranks, num_microbatches, num_chunks), stages)
        finish = [0.0] * num_ranks
        for name, (_, end) in spans.items():
            rank = Action.parse(name).stage % num_ranks
            finish[rank] = max(finish[rank], end)
        assert result.last_backward_s == pytest.approx(finish, rel=1e-12)
        step = [sum(stage.step_s for stage in stages[rank::num_ranks]) for rank in range(num_ranks)]
        assert result.step_time_s == pytest.approx(max(map(sum, zip(finish, step, strict=True))), rel=1e-12)
        timeline = {str(action): (start, end) for _, action, start, end in result.timeline()}
        assert timeline.keys() == spans.keys()
        for name, span in spans.items():
            assert timeline[name] == pytest.approx(span, rel=1e-12)


def test_bubble_counts_idle_device_seconds():
    # B (f + b) = 24 busy seconds a stage of a 33 s step, on submeshes of 2 and 6 devices and two of 4.
    even = [StageTimes(forward_s=1.0, backward_s=2.0)] * 4
    assert simulate("1f1b", even, 8, num_devices=[2, 6, 4, 4]).bubble_fraction == pytest.approx(9 / 33)
    # Stage 1 is idle for 2 x 4 of its 12 seconds on 3 of 4 devices.
    uneven = [StageTimes(forward_s=1.0, backward_s=2.0), StageTimes(forward_s=0.25, backward_s=0.25)]
    result = simulate("gpipe", uneven, 4, num_devices=[1, 3])
    total = result.step_time_s * 4
    assert result.bubble_fraction == pytest.approx((total - 12 - 3 * 2) / total)


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "interleaved"])
def test_bound_is_never_above_the_simulation(schedule):
    rng = random.Random(11)
    for _ in range(600):
        num_ranks, num_chunks = rng.randint(1, 10), 1
        num_microbatches = rng.randint(1, 60)
        if schedule == "interleaved":
            num_chunks, num_microbatches = rng.randint(1, 3), num_ranks * rng.randint(1, 4)
        stages = random_stages(rng, num_ranks * num_chunks, rng.choice([0.0, 0.1, 1.0, 5.0]))
        simulated = simulate(schedule, stages, num_microbatches, num_chunks).step_time_s
        bound = pipeline_lower_bound_s(schedule, stages, num_microbatches, num_chunks)
        assert bound <= simulated * (1 + 1e-12)
        if num_chunks == 1:
            # The plain form: the transfers to a stage, and the stage's work.
            times = [stage.forward_s + stage.backward_s for stage in stages]
            plain = max(sum(times[:s]) + num_microbatches * times[s] for s in range(num_ranks))
            assert bound >= max(plain, sum(times)) * (1 - 1e-12)


def test_bound_is_tight_for_even_stages():
    even = [StageTimes(forward_s=1.0, backward_s=2.0)] * 6
    for schedule in ("1f1b", "gpipe"):
        assert pipeline_lower_bound_s(schedule, even, 20) == simulate(schedule, even, 20).step_time_s
