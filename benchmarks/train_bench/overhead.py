"""What the trainer adds to DeepSpeed's own step, and DeepSpeed to plain torch's: all three in turn, step by step."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from cache_bench.figures import Figure, quartiles, ratio_figure

import distill.trainer
from distill.batch import Batch
from distill.config import Stage, TrainConfig
from distill.engine import Engine, TorchEngine
from distill.stages import StageModel
from distill.trainer import train_student
from distill.zero import leaf_modules, make_engine
from distill.zero_config import deepspeed_config
from train_bench.inputs import Inputs
from train_bench.stage import take_step, total_counts

SECTION = "overhead"
STAGE: Stage = "distill"
BAR = 0.03
WARM_UP = 2
"""Steps of each side that do not count."""

Step = Callable[[list[Batch]], None]


class InterleavedEngine:
    """The trainer's engine; after each of its steps others take the same step, so that all meet the same machine.

    Everything between the end of the others' steps and the end of the trainer's next one is the trainer's time: logs,
    metrics, waiting for data, forward, backward and update.
    """

    def __init__(self, engine: Engine, *, others: Mapping[str, Step]) -> None:
        self._engine = engine
        self._others = others
        self._batches: list[Batch] = []
        self._resumed = time.perf_counter()
        self.seconds: dict[str, list[float]] = {name: [] for name in ("trainer", *others)}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def forward(self, **inputs: Any) -> Any:
        """Run the trainer's forward, and keep what it learns from."""
        if inputs.get("counts") is not None:
            self._batches.append(inputs["batch"])
        return self._engine.forward(**inputs)

    def step(self, *, learning_rate: float) -> None:
        """Take the trainer's step, then those of the others."""
        self._engine.step(learning_rate=learning_rate)
        self.seconds["trainer"].append(time.perf_counter() - self._resumed)
        for name, take in self._others.items():
            start = time.perf_counter()
            take(self._batches)
            self.seconds[name].append(time.perf_counter() - start)
        self._batches = []
        self._resumed = time.perf_counter()


def measure(inputs: Inputs, folder: Path) -> Iterator[Figure]:
    """Yield both comparisons."""
    settings = inputs.settings
    student = next(iter(inputs.students.values()))
    config = {**settings.overhead_stage, "max_steps": settings.overhead_pairs + WARM_UP}
    # every sample is tokenised each time, as in a first epoch
    train = TrainConfig.model_validate({STAGE: config, "stages": [STAGE], "encoding_cache_mib": 0})
    engines: list[InterleavedEngine] = []

    def make_interleaved(model: StageModel, **options: Any) -> InterleavedEngine:
        others = {
            "deepspeed": bare_deepspeed(copy.deepcopy(model), train=train),
            "torch": bare_torch(copy.deepcopy(model), options),
        }
        engines.append(InterleavedEngine(make_engine(model, **options), others=others))
        return engines[0]

    with mock.patch.object(distill.trainer, "make_engine", make_interleaved):
        train_student(cache=inputs.cache, student=student, train=train, output_dir=folder / "overhead")
    seconds = {name: one[WARM_UP:] for name, one in engines[0].seconds.items()}
    medians = {name: statistics.median(one) for name, one in seconds.items()}
    parameters = sum(parameter.ds_numel for parameter in engines[0].model.parameters())
    size = f"{config['global_batch_size']} samples, {parameters / 1e6:.0f} M parameters, one process, {STAGE}"
    added = [own / bare - 1 for own, bare in zip(seconds["trainer"], seconds["deepspeed"], strict=True)]
    low, middle, high = quartiles(added)
    yield Figure(
        section=SECTION,
        name="what the trainer adds to DeepSpeed's own step",
        value=middle,
        unit="of the step",
        bar=BAR,
        at_most=True,
        low=low,
        high=high,
        pairs=len(added),
        note=f"{medians['trainer']:.2f} s with the trainer, {medians['deepspeed']:.2f} s bare; {size}",
        json_name="trainer_overhead_fraction",
    )
    yield ratio_figure(
        SECTION,
        "a bare ZeRO-3 step, against plain torch",
        base_s=seconds["torch"],
        own_s=seconds["deepspeed"],
        note=f"{medians['deepspeed']:.2f} s and {medians['torch']:.2f} s; {size}",
        json_name="zero3_speed_over_plain_torch",
    )


def bare_deepspeed(model: StageModel, *, train: TrainConfig) -> Step:
    """Return DeepSpeed's own loop with the trainer's configuration."""
    import deepspeed
    from deepspeed.utils.z3_leaf_module import set_z3_leaf_module

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    config = deepspeed_config(STAGE, train=train, dtype="float32", num_trained=sum(p.numel() for p in trained))
    for module in leaf_modules(model, max_parameters=train.zero.leaf_module_parameters):
        set_z3_leaf_module(module, True)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)

    def take(batches: list[Batch]) -> None:
        counts = total_counts(batches)
        for batch in batches:
            engine.backward(engine(batch=batch, counts=counts).loss, scale_wrt_gas=False)
        engine.step()

    model.train()
    return take


def bare_torch(model: StageModel, options: Mapping[str, Any]) -> Step:
    """Return the same loop without DeepSpeed."""
    engine = TorchEngine(model, **options)
    return lambda batches: take_step(engine, batches)
