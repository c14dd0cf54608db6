"""The training loop: it walks a :class:`Task` over data and never asks which paper it runs.

A run folder gets ``history.jsonl`` (one line per log and per epoch), ``checkpoints/``, ``model/`` (the last
weights) and, where a metric selects, ``best/``. Interrupted at any moment, also by ``kill -9``, and resumed
with the same number of processes, a run ends with the same weights and numbers, bit for bit, as one never
stopped (on a CPU; on other devices as far as their kernels repeat themselves).
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import fnmatch
import importlib
import importlib.util
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .checkpoint import (
    RandomState,
    check_same_run,
    disk_errors,
    list_checkpoints,
    load_checkpoint,
    random_state,
    read_checkpoint_state,
    save_checkpoint,
    set_random_state,
)
from .data.loaders import (
    Batch,
    Order,
    SampleDataset,
    Step,
    StreamDataset,
    TrainSteps,
    gather_objects,
    import_training_extra,
)
from .errors import InputError
from .files import atomic_folder, new_output_folder, write_json, write_text
from .recipes import plain_values, resolved_toml, run_record

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState  # pyright: ignore[reportMissingTypeStubs]

logger = logging.getLogger(__name__)


# --- Settings -----------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class TrainConfig:
    """Fields of a training run; a package adds its own by inheriting.

    Values are plain (numbers, strings, paths, tuples and mappings of them), so that a recipe, a command line
    and a checkpoint can all say them.
    """

    may_change_on_resume: ClassVar[frozenset[str]] = frozenset(
        {"output_dir", "workers", "threads", "save_every", "keep_checkpoints", "log_every", "tracker"}
    )
    """Fields without influence on the weights: a resumed run may give other values."""

    data: str = "synthetic"
    """Data source: a known name, a folder, or hf://owner/name."""
    data_options: dict[str, bool | int | float | str] = field(
        default_factory=dict[str, bool | int | float | str]
    )
    """Options of the data source."""
    output_dir: Path = Path("run")
    """Run folder."""
    seed: int = 26
    """Seed of initial weights, order, augmentation and dropout."""

    epochs: int = 30
    """Passes over the training images."""
    batch_size: int = 32
    """Images per forward pass of one process."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    drop_last: bool = False
    """Leave out the last step of an epoch where it is not full."""
    repeated_augmentation: int = 1
    """Take each image so many times in a row, each augmented anew, and that much fewer images an epoch; DeiT: 3."""
    eval_batch_size: int = 64
    """Images per forward pass of one process in evaluation."""
    evaluate_every: int = 1
    """Evaluate after every so many epochs, and after the last."""

    optimizer: str = "adamw"
    """Any optimizer of timm: adamw, sgd, lion, lookahead_adamw, ..."""
    lr: float = 5e-5
    """Learning rate, not scaled by the batch size."""
    weight_decay: float = 0.05
    """Not applied to 1-D tensors (biases, norms, scalars) nor to what the model or no_decay exempts."""
    momentum: float = 0.9
    """For optimizers that have it."""
    betas: tuple[float, float] | None = None
    """The optimizer's own where not given; AdamW: 0.9 0.999."""
    eps: float | None = None
    """The optimizer's own where not given; AdamW: 1e-8."""
    layer_decay: float | None = None
    """Multiply the learning rate by this for each layer further from the output."""
    lr_scales: dict[str, float] = field(default_factory=dict[str, float])
    """Factor of the learning rate by parameter name pattern, such as backbone.* 0.1; factors multiply."""
    no_decay: tuple[str, ...] = ()
    """Further parameter name patterns without weight decay."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together."""

    schedule: Literal["constant", "cosine", "tanh", "poly", "step", "multistep"] = "constant"
    """How the learning rate goes after the warm-up."""
    schedule_per_step: bool = False
    """Change the learning rate at every optimizer step instead of every epoch."""
    warmup_epochs: float = 0
    """Length of the linear warm-up, part of epochs."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    cooldown_epochs: int = 0
    """Epochs at min_lr after the schedule, part of epochs."""
    min_lr: float = 0.0
    """Where cosine, tanh and poly end."""
    decay_epochs: tuple[float, ...] = (30,)
    """step: the interval; multistep: the epochs, counted from 1, that begin with a lower learning rate."""
    decay_rate: float = 0.1
    """step and multistep: factor of each decay; poly: the power."""

    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Number format inside the model, in training and evaluation; weights stay float32."""
    ema_decay: float | None = None
    """Keep a moving average of the weights with this decay; it is what gets evaluated and saved."""
    ema_warmup: bool = False
    """Let the average follow quickly at first (for runs that are short for the decay)."""
    compile: bool = False
    """torch.compile the model."""
    find_unused_parameters: bool = False
    """For several processes: allow parameters that take no part in a step."""

    workers: int = 4
    """Processes that load images, for each training process; 0 loads in the training process."""
    threads: int = 0
    """CPU threads of a training process; 0 leaves PyTorch's choice."""
    deterministic: bool = True
    """Choose what gives the same bits every time, where there is such a choice."""

    save_every: int = 0
    """Optimizer steps between checkpoints; 0 saves at the end of each epoch only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    log_every: int = 50
    """Optimizer steps between log lines; a loss that is not finite is also noticed then."""
    select_by: str = "last"
    """Metric that chooses the best model, or last."""
    select_mode: Literal["max", "min"] = "max"
    """Whether a larger or a smaller metric is better."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where to send the numbers besides history.jsonl."""

    def check(self) -> None:
        """Raise :class:`InputError` for values outside of their range; :func:`train` calls it."""
        at_least_one = ("epochs", "batch_size", "accumulate", "eval_batch_size", "evaluate_every")
        for name in (*at_least_one, "keep_checkpoints", "log_every", "repeated_augmentation"):
            _expect(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        at_least_zero = ("workers", "threads", "save_every", "weight_decay", "warmup_epochs", "warmup_lr")
        for name in (*at_least_zero, "min_lr"):
            _expect(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        cooldown = self.cooldown_epochs
        _expect("cooldown_epochs", cooldown, 0 <= cooldown < self.epochs, f"0 to {self.epochs - 1}")
        _expect("lr", self.lr, 0 < self.lr < math.inf, "a number above 0")
        _expect("seed", self.seed, 0 <= self.seed < 2**31, "0 to 2147483647")
        for name in ("clip_grad", "eps"):
            value: float | None = getattr(self, name)
            _expect(name, value, value is None or value > 0, "a number above 0 or none")
        decay = self.layer_decay
        _expect("layer_decay", decay, decay is None or 0 < decay <= 1, "a number above 0, up to 1, or none")
        decay = self.ema_decay
        _expect("ema_decay", decay, decay is None or 0 <= decay < 1, "a number from 0 to below 1, or none")
        decays = self.decay_epochs
        _expect("decay_epochs", decays, len(decays) > 0 and min(decays) > 0, "one or more numbers above 0")


def _expect(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name} {value}: expected {expected}; change --{name.replace('_', '-')}")


# --- What a run is made of ----------------------------------------------------------------------------------


class Task(Protocol):
    """A method, seen from the loop: batch in, losses out.

    A task may also have

    - ``param_groups(model, config)``, which returns optimizer groups with plain values (``params``,
      ``weight_decay``, ``lr_scale``) and replaces :func:`param_groups`;
    - ``begin_epoch(epoch)``, called as a 0-based epoch begins or is resumed;
    - ``before_update(model)``, called when the gradients of an optimizer step are complete, before they are
      clipped: it may change them, or take them away (None) from what must stay as it is;
    - ``after_update(model, progress)``, called after each optimizer step, for what follows the weights, such as
      a momentum encoder; ``progress`` in ``(0, 1]`` is the share of the training that is done (of a stream,
      whose length is not known, the share of whole epochs done before this one).

    Both get the bare model. What they need to know between steps belongs in the model's buffers, which
    checkpoints keep, or follows from their arguments.

    Example:
        >>> def classify(model, batch):
        ...     logits = model(batch["images"])
        ...     return {"loss": nn.functional.cross_entropy(logits, batch["labels"])}
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
        >>> list(classify(model, {"images": torch.zeros(2, 3, 2, 2), "labels": torch.tensor([4, 0])}))
        ['loss']
    """

    def __call__(self, model: nn.Module, batch: Batch, /) -> dict[str, Tensor]:
        """Run the model on a batch.

        Args:
            model: as wrapped for the launch; call it, do not reach into it.
            batch: see :func:`attnmap_core.data.loaders.collate`, tensors on the model's device.

        Returns:
            Scalars: ``"loss"``, the mean over the samples of the batch, with gradient, and the parts to
                report,
            the same names every time.
        """
        ...


class Schedule(Protocol):
    """Sets the learning rates of an optimizer; every scheduler of timm is one.

    The rate must be a function of the argument alone: nothing else of it is saved for a resume.
    """

    def step(self, epoch: int, /) -> None:
        """Called as a 0-based epoch begins."""

    def step_update(self, num_updates: int, /) -> None:
        """Called before each optimizer step with the number of steps done."""


MakeSchedule: TypeAlias = Callable[[torch.optim.Optimizer, Any, "int | None"], Schedule]
Evaluate: TypeAlias = "Callable[[nn.Module, Accelerator], Mapping[str, float]]"
SaveModel: TypeAlias = Callable[[nn.Module, Path], Any]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What :func:`train` did.

    Attributes:
        history: the records of ``history.jsonl``, see :func:`train`.
        best: ``{"epoch", "metric", "value"}`` of the model in ``best/``; None where ``select_by`` is
            ``"last"``.
        steps: optimizer steps, over all resumes.
        seconds: time spent, over all resumes.
    """

    history: list[dict[str, Any]]
    best: dict[str, Any] | None
    steps: int
    seconds: float


def train(
    task: Task,
    model: nn.Module,
    data: SampleDataset | StreamDataset,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    evaluate: Evaluate | None = None,
    make_schedule: MakeSchedule | None = None,
    save_model: SaveModel | None = None,
    order: Order | None = None,
    resume: bool = False,
) -> TrainResult:
    """Train ``model`` and leave everything about it in ``run_dir``.

    The same call works in one process and under ``accelerate launch``, which decides device and processes.
    ``model`` is trained in place; ``run_dir/model`` holds what is meant to be used, which with ``ema_decay``
    is the averaged weights.

    Records of the history have ``kind`` ``"log"`` (means since the last one) or ``"epoch"`` (means of the
    epoch, with ``metrics``), ``epoch`` counted from 1, ``step``, ``lr`` (before scales), ``loss`` and the
    task's parts; ``images_per_second`` and ``seconds`` are all that differs between two runs of one
    configuration.

    Args:
        task: the method.
        model: with initial or pretrained weights, the same in every process.
        data: training samples with their transform.
        config: the settings.
        run_dir: the run folder; made where missing. Several machines need it on a disk that they share.
        evaluate: ``evaluate(model, accelerator)`` gives metrics by name. It runs in every process with the
            model in eval mode, without distributed wrapper. What it draws from random generators does not
            matter.
        make_schedule: ``make_schedule(optimizer, config, steps_per_epoch)``; by default timm's, as
            configured. ``steps_per_epoch`` is None for a stream.
        save_model: ``save_model(model, folder)`` writes a model folder, for example by ``save_pretrained``.
            It runs in the main process; without it, no model folder is written.
        order: images of each epoch in place of a seeded permutation, for sampling by class. Its list is that of
            all processes, and the same in each.
        resume: go on from the newest checkpoint in ``run_dir``, or begin where there is none.

    Raises:
        InputError: for settings that cannot work, a loss that is not finite (nothing of that step is saved),
            a full disk (older checkpoints stay), or a checkpoint of another configuration or process count.
    """
    config.check()
    if config.select_by != "last" and evaluate is None:
        raise InputError(f"select_by {config.select_by}: this run has no evaluation; use last")
    accelerator = start_accelerator(config, run_dir)
    with _torch_settings(config, accelerator.device):
        run = _Run(
            task, model, data, config, Path(run_dir), accelerator, evaluate, make_schedule, save_model, order
        )
        if resume:
            run.resume()
        elif list_checkpoints(run.checkpoints):
            raise InputError(f"{run_dir}: holds checkpoints of a run; pass --resume to go on, or --overwrite")
        return run.finish()


# --- Optimizer and schedule ---------------------------------------------------------------------------------


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Trainable parameters by weight decay and learning-rate scale.

    No decay for tensors of at most one dimension, for names in ``config.no_decay``, and for what any
    submodule with a ``no_weight_decay()`` names. Scales come from ``config.lr_scales`` and
    ``config.layer_decay``.

    Raises:
        InputError: if a pattern matches no parameter, or layer decay meets a model without ``group_matcher``.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> for group in param_groups(model, TrainConfig(lr_scales={"0.*": 0.1})):
        ...     print(len(group["params"]), group["weight_decay"], group["lr_scale"])
        1 0.05 0.1
        1 0.0 0.1
        1 0.05 1.0
        1 0.0 1.0
    """
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    for pattern in (*config.no_decay, *config.lr_scales):
        if not fnmatch.filter(parameters, pattern):
            close = difflib.get_close_matches(pattern, parameters, n=1, cutoff=0)
            raise InputError(f"{pattern}: matches no parameter; expected names such as {', '.join(close)}")
    no_decay = [*config.no_decay]
    for prefix, module in model.named_modules():
        exempt: Callable[[], set[str]] = getattr(module, "no_weight_decay", set[str])
        no_decay += [f"{prefix}.{name}" if prefix else name for name in sorted(exempt())]
    layer_scales = _layer_scales(model, parameters, config.layer_decay)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in parameters.items():
        exempted = parameter.ndim <= 1 or any(fnmatch.fnmatch(name, pattern) for pattern in no_decay)
        decay = 0.0 if exempted else config.weight_decay
        scale = layer_scales.get(name, 1.0)
        scale *= math.prod(s for pattern, s in config.lr_scales.items() if fnmatch.fnmatch(name, pattern))
        group = groups.setdefault((decay, scale), {"params": [], "weight_decay": decay, "lr_scale": scale})
        group["params"].append(parameter)
    return list(groups.values())


def _layer_scales(
    model: nn.Module, trainable: Collection[str], layer_decay: float | None
) -> dict[str, float]:
    if layer_decay is None:
        return {}
    from timm.models import group_parameters

    matcher: Any = getattr(model, "group_matcher", None)
    if matcher is None:
        raise InputError(
            f"layer_decay {layer_decay}: {type(model).__name__} does not tell its layers (group_matcher); "
            "use lr_scales instead"
        )
    grouped: Any = group_parameters(model, matcher(coarse=False), reverse=True)
    layers: dict[str, int] = grouped
    last = max(layers[name] for name in trainable)
    return {name: layer_decay ** (last - layers[name]) for name in trainable}


def make_optimizer(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that ``config`` names, with the options among its fields that it knows."""
    from timm.optim import create_optimizer_v2, list_optimizers

    name = config.optimizer.lower()
    known: list[Any] = list_optimizers()
    if name.removeprefix("lookahead_") not in known:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise InputError(
            f"optimizer {config.optimizer}: timm has none of that name; did you mean {close[0]}?"
        )
    given: dict[str, Any] = {"betas": config.betas, "eps": config.eps}
    given = {option: value for option, value in given.items() if value is not None}
    if name in ("adam", "adamw"):
        given["fused"] = True  # one pass over the weights, three times as fast as a loop over tensors
    decay, momentum = config.weight_decay, config.momentum
    return create_optimizer_v2(groups, name, lr=config.lr, weight_decay=decay, momentum=momentum, **given)


def timm_schedule(
    optimizer: torch.optim.Optimizer, config: TrainConfig, steps_per_epoch: int | None
) -> Schedule:
    """The schedule that the fields of ``config`` describe.

    Raises:
        InputError: if it should change at every step of a stream, whose length is not known.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        >>> schedule = timm_schedule(optimizer, TrainConfig(lr=0.1, epochs=4, schedule="cosine"), None)
        >>> schedule.step(2)
        >>> round(optimizer.param_groups[0]["lr"], 6)
        0.05
    """
    from timm.scheduler import create_scheduler_v2

    if config.schedule_per_step and steps_per_epoch is None:
        raise InputError("schedule_per_step: a stream has no known length; let the rate change every epoch")
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="step" if config.schedule == "constant" else config.schedule,
        num_epochs=config.epochs - config.cooldown_epochs,
        decay_epochs=config.decay_epochs[0],
        decay_milestones=list(config.decay_epochs),  # pyright: ignore[reportArgumentType] (timm says int)
        decay_rate=1.0 if config.schedule == "constant" else config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=config.warmup_lr,
        warmup_epochs=config.warmup_epochs,  # pyright: ignore[reportArgumentType]
        step_on_epochs=not config.schedule_per_step,
        updates_per_epoch=steps_per_epoch or 0,
    )
    assert schedule is not None
    return schedule


# --- Launch -------------------------------------------------------------------------------------------------


def start_processes() -> PartialState:
    """Find the processes of this launch; a training program calls it before it writes anything.

    It mends two cases in which Accelerate would go on as if each process were alone, without saying so:
    ``accelerate launch --cpu --num_processes N`` without MPI starts a single process (this one is then
    replaced by PyTorch's launcher, which runs the same command N times), and under ``torchrun`` on a machine
    without a GPU the processes do not find each other.

    Returns:
        Accelerate's state, with ``num_processes``, ``process_index``, ``is_main_process`` and ``device``.

    Raises:
        InputError: if accelerate is not installed, or for several machines without a launcher on each.
    """
    processes, machines = _processes_asked()
    if machines > 1:
        raise InputError(
            f"accelerate launch --cpu --num_machines {machines}: starts one process a machine; use torchrun"
        )
    if processes > 1:
        command = sys.orig_argv[1:]
        while command[0].startswith("-") and command[0] != "-m":  # options of the interpreter
            command = command[1:]
        address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
        launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
        launcher += ["--master_addr", address, "--master_port", port]
        os.execv(sys.executable, [sys.executable, *launcher, *command])
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # Its functions take the group that is open at the import for a default argument. If PyTorch imports it
        # later, they keep the group alive after its end, and gloo's threads then abort the exit now and then.
        importlib.import_module("torch.distributed.nn.functional")
        atexit.register(_close_gloo)
    cpu = _is_on("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state: PartialState = import_training_extra("accelerate").PartialState(cpu=cpu)
    if state.num_processes == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "accelerate was used before start_processes() and takes this process for the only one"
        )
    return state


def _close_gloo() -> None:
    """At the exit, while there is an interpreter that its threads can ask for."""
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


def _is_on(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in {"1", "true", "yes", "on"}


def _processes_asked() -> tuple[int, int]:
    """Processes and machines asked of ``accelerate launch`` where it is our parent and started only us."""
    started = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"} & os.environ.keys()
    if started or not _is_on("ACCELERATE_USE_CPU"):
        return 1, 1
    parent = import_training_extra("psutil").Process().parent()
    command: list[str] = parent.cmdline() if parent is not None else []
    names = [Path(part).name for part in command[:4]]
    if "accelerate" in names and "launch" in names:
        options = command[names.index("launch") + 1 :]
    elif known := {"accelerate-launch", "accelerate.commands.launch"} & set(names):
        options = command[names.index(known.pop()) + 1 :]
    else:
        return 1, 1
    asked = import_training_extra("accelerate.commands.launch").launch_command_parser().parse_args(options)
    configs = import_training_extra("accelerate.commands.config.config_args")
    if asked.config_file or (not asked.cpu and Path(configs.default_config_file).is_file()):
        defaults: Any = configs.load_config_from_file(asked.config_file)
        asked.num_processes = asked.num_processes or defaults.num_processes
        asked.num_machines = asked.num_machines or defaults.num_machines
    return asked.num_processes or 1, asked.num_machines or 1


def prepare_run(
    run_dir: Path, config: TrainConfig, header: str, distribution: str, *, resume: bool, overwrite: bool
) -> None:
    """Make a run folder with ``recipe.toml`` (all fields) and ``run.json`` (the record of the launch).

    The main process writes; a failure is everyone's.

    Args:
        run_dir: the folder.
        config: of the run.
        header: comment block of the recipe.
        distribution: package whose version the record tells.
        resume: the folder may be there, with a run to go on with.
        overwrite: replace what is there.

    Raises:
        InputError: if the folder is there and neither was asked for.
    """
    state = start_processes()
    problem: str | None = None
    if state.is_main_process:
        try:
            new_output_folder(run_dir, resume=resume, overwrite=overwrite)
            write_text(run_dir / "recipe.toml", resolved_toml(config, header))
            write_json(run_dir / "run.json", run_record(config.seed, (distribution,)))
        except InputError as error:
            problem = str(error)
    if (problem := gather_objects(state, problem)[0]) is not None:
        raise InputError(problem)


def start_accelerator(config: TrainConfig, run_dir: str | Path) -> Accelerator:
    """The :class:`accelerate.Accelerator` of a run: device and processes by the launch, the rest by
    ``config``.

    Raises:
        InputError: if accelerate or the tracker is not installed, or the device cannot do the precision.
    """
    state = start_processes()
    accelerate = import_training_extra("accelerate")
    if config.tracker != "none":
        if importlib.util.find_spec(config.tracker) is None:
            raise InputError(f"tracker {config.tracker}: not installed; run: pip install {config.tracker}")
        if config.tracker not in [kind.value for kind in accelerate.utils.LoggerType]:
            raise InputError(
                f"tracker {config.tracker}: unknown to this accelerate; pip install -U accelerate"
            )
    if config.mixed_precision == "fp16" and str(state.device) == "cpu":
        raise InputError("mixed_precision fp16: needs a GPU and this run is on the CPU; use bf16 or no")
    # DistributedDataParallel lays out its gradient buckets anew after the first step, unless it looks for
    # unused parameters. Sums of three or more numbers depend on the layout, and a resumed run has a first
    # step again.
    find_unused = config.find_unused_parameters or (config.deterministic and state.num_processes > 2)
    # Accelerate keeps one precision per process; a second run in it may ask for another.
    shared: Any = accelerate.state.AcceleratorState
    if shared._shared_state and shared().mixed_precision != config.mixed_precision:
        shared._reset_state()
    try:
        return accelerate.Accelerator(
            mixed_precision=config.mixed_precision,
            # The loop weighs and accumulates by itself: an environment variable must not divide once more.
            gradient_accumulation_plugin=accelerate.utils.GradientAccumulationPlugin(num_steps=1),
            log_with=None if config.tracker == "none" else config.tracker,
            project_dir=str(run_dir),
            kwargs_handlers=[accelerate.DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        )
    except ValueError as error:
        raise InputError(f"mixed_precision {config.mixed_precision}: {str(error).splitlines()[0]}") from None


@contextlib.contextmanager
def _torch_settings(config: TrainConfig, device: torch.device) -> Generator[None]:
    """Threads and determinism for the time of a run."""
    cudnn: Any = torch.backends.cudnn
    debugging: Any = torch.utils.deterministic
    threads, cudnn_before = torch.get_num_threads(), (cudnn.deterministic, cudnn.benchmark)
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    filling = debugging.fill_uninitialized_memory
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.deterministic:
        if device.type == "cuda":
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        cudnn.deterministic, cudnn.benchmark = True, False
        torch.use_deterministic_algorithms(True, warn_only=True)
        debugging.fill_uninitialized_memory = False  # an aid to find bugs, which costs time
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = cudnn_before
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        debugging.fill_uninitialized_memory = filling


# --- The loop -----------------------------------------------------------------------------------------------


class _Run:
    """One run: its parts, its position, and what happens at each step and epoch."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        data: SampleDataset | StreamDataset,
        config: TrainConfig,
        folder: Path,
        accelerator: Accelerator,
        evaluate: Evaluate | None,
        make_schedule: MakeSchedule | None,
        save_model: SaveModel | None,
        order: Order | None,
    ) -> None:
        self.task, self.config, self.folder, self.accelerator = task, config, folder, accelerator
        self.checkpoints = folder / "checkpoints"
        self.evaluate, self.save_model = evaluate, save_model
        self.steps = TrainSteps(
            data,
            config.batch_size,
            accumulate=config.accumulate,
            seed=config.seed,
            processes=accelerator.num_processes,
            process=accelerator.process_index,
            workers=config.workers,
            drop_last=config.drop_last,
            repeats=config.repeated_augmentation,
            order=order,
            pin_memory=accelerator.device.type == "cuda",
            all_sum=lambda n: sum(gather_objects(accelerator, n)),
        )
        groups = getattr(task, "param_groups", param_groups)(model, config)
        optimizer = make_optimizer(groups, config)
        self.configured_schedule = make_schedule is None
        self.schedule = (make_schedule or timm_schedule)(optimizer, config, self.steps.steps)
        if config.compile:
            model.compile()
        self.model: nn.Module
        self.optimizer: Any
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.bare: nn.Module = accelerator.unwrap_model(self.model)  # no distributed wrapper; precision kept
        self.ema = None if config.ema_decay is None else self._make_ema(config.ema_decay)

        self.epoch = 0  # of the next step, 0-based
        self.step = 0  # next optimizer step within the epoch
        self.updates = 0  # optimizer steps done in all
        self.best: dict[str, Any] | None = None
        self.history: list[dict[str, Any]] = []
        self.means = _Means()
        self.unread: list[tuple[int, Tensor]] = []  # images and losses of steps not yet looked at
        self.names: list[str] = []
        self.seconds_before = 0.0
        self.began = self.last_log = time.perf_counter()
        self.images_since_log = 0  # for the rate only, so not restored by a resume
        self.saved_at: int | None = None
        _seed_everything(config.seed + accelerator.process_index)

    def _make_ema(self, decay: float) -> Any:
        from timm.utils.model_ema import ModelEmaV3

        return ModelEmaV3(self.bare, decay=decay, use_warmup=self.config.ema_warmup)

    @property
    def weights(self) -> nn.Module:
        """The model that is evaluated and published."""
        return self.bare if self.ema is None else self.ema.module

    def finish(self) -> TrainResult:
        """Train from the present position to the end."""
        config, main = self.config, self.accelerator.is_main_process
        if config.tracker != "none":
            values = {name: str(value) for name, value in plain_values(config).items()}
            self.accelerator.init_trackers(self.folder.name or "run", config=values)
        total = None if self.steps.steps is None else self.steps.steps * config.epochs
        # None hides the bar where there is no terminal.
        with tqdm(total=total, initial=self.updates, unit="step", disable=None if main else True) as bar:
            for epoch in range(self.epoch, config.epochs):
                self._train_epoch(epoch, bar)
                self._end_epoch(epoch)
        self._save_model("model")
        for tracker in self.accelerator.trackers:
            tracker.finish()
        # Take Accelerate's precision wrapper off the caller's model again.
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        return TrainResult(history=self.history, best=self.best, steps=self.updates, seconds=self._seconds())

    def _train_epoch(self, epoch: int, bar: Any) -> None:
        config = self.config
        self.model.train()
        self.schedule.step(epoch)
        self._hook("begin_epoch", epoch)
        for step in self.steps.epoch(epoch, start=self.step):
            self.schedule.step_update(self.updates)
            self._optimizer_step(step)
            self.step += 1
            self.updates += 1
            bar.update()
            if self.updates % config.log_every == 0:
                self._log(bar)
            if config.save_every and self.updates % config.save_every == 0 and self.step != self.steps.steps:
                self._save()

    def _optimizer_step(self, step: Step) -> None:
        """One optimizer step over this process's micro-batches; gradients are averaged over the processes."""
        accelerator = self.accelerator
        images, losses = 0, torch.zeros((), device=accelerator.device)
        for number, batch in enumerate(step, start=1):
            weight: float = batch["weight"]
            exchange = number == len(step)  # gradients travel once a step, with the last micro-batch
            with contextlib.nullcontext() if exchange else accelerator.no_sync(self.model):
                parts = self.task(self.model, _to_device(batch, accelerator.device))
                self._check_parts(parts)
                accelerator.backward(parts["loss"] * weight)
            reported = torch.stack([parts[name].detach().float() for name in self.names])
            losses = losses + reported * (weight / accelerator.num_processes)
            images += len(batch["labels"]) if weight > 0 else 0
        self._hook("before_update", self.bare)
        if self.config.clip_grad is not None:
            accelerator.clip_grad_norm_(self.model.parameters(), self.config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        done = self.epoch + (0 if self.steps.steps is None else (self.step + 1) / self.steps.steps)
        self._hook("after_update", self.bare, done / self.config.epochs)
        if self.ema is not None:
            self.ema.update(self.bare, step=self.updates + 1)
        self.unread.append((images, losses))

    def _hook(self, name: str, *arguments: Any) -> None:
        hook = getattr(self.task, name, None)
        if hook is not None:
            hook(*arguments)

    def _check_parts(self, parts: Mapping[str, Tensor]) -> None:
        names = ["loss", *sorted(parts.keys() - {"loss"})]
        if "loss" not in parts or any(value.ndim for value in parts.values()):
            shapes = {name: tuple(value.shape) for name, value in parts.items()}
            raise ValueError(f'a task must return scalars with "loss" among them, got {shapes}')
        if self.names and names != self.names:
            raise ValueError(f"a task must return the same names every time, got {names} after {self.names}")
        self.names = names

    def _read_losses(self) -> None:
        """Add up the losses since the last time (one wait for the device) and refuse what is not finite."""
        if not self.unread:
            return
        counts = torch.tensor([images for images, _ in self.unread], device=self.accelerator.device)
        losses = torch.stack([losses for _, losses in self.unread])
        counts, losses = self.accelerator.reduce((counts, losses), reduction="sum")
        first = self.updates - len(self.unread) + 1
        self.unread = []
        for step, (images, row) in enumerate(zip(counts.tolist(), losses.double().tolist()), start=first):
            parts = dict(zip(self.names, row))
            if not all(map(math.isfinite, row)):
                listed = ", ".join(f"{name} {value:.6g}" for name, value in parts.items())
                saved = "nothing" if self.saved_at is None else f"the checkpoint of step {self.saved_at}"
                raise InputError(
                    f"step {step} (epoch {self.epoch + 1}): loss not finite ({listed}) at learning rate "
                    f"{self._lr():.4g}; {saved} is kept; lower --lr, set --clip-grad 1, add --warmup-epochs "
                    "or use --mixed-precision no"
                )
            self.means.add(images, parts)
            self.images_since_log += images

    def _log(self, bar: Any) -> None:
        self._read_losses()
        means = self.means.take("log")
        now = time.perf_counter()
        rate = self.images_since_log / (now - self.last_log)
        self.last_log, self.images_since_log = now, 0
        self._record({"kind": "log", **self._where(), **means, "images_per_second": rate})
        shown = {name: f"{value:.4g}" for name, value in means.items()}
        bar.set_postfix({**shown, "lr": f"{self._lr():.3g}", "img/s": f"{rate:.0f}"})
        self.accelerator.log({f"train/{name}": value for name, value in means.items()}, step=self.updates)
        self.accelerator.log({"lr": self._lr(), "images_per_second": rate}, step=self.updates)

    def _end_epoch(self, epoch: int) -> None:
        config = self.config
        self._read_losses()
        paused = time.perf_counter()
        means = self.means.take("epoch")
        if not means:
            raise InputError("the training data gave no image in a whole epoch; check the data source")
        record: dict[str, Any] = {"kind": "epoch", **self._where(), **means}
        due = (epoch + 1) % config.evaluate_every == 0 or epoch + 1 == config.epochs
        if self.evaluate is not None and due:
            metrics = self._evaluate(self.evaluate)
            record["metrics"] = {name: _finite_or_none(value) for name, value in metrics.items()}
            self._select(epoch, metrics)
            numbers = {f"eval/{name}": value for name, value in metrics.items() if math.isfinite(value)}
            self.accelerator.log(numbers, step=self.updates)
        self.epoch, self.step = epoch + 1, 0
        self._record({**record, "seconds": self._seconds()})
        self._save()
        self.last_log += time.perf_counter() - paused
        if self.accelerator.is_main_process:
            shown = _shown(means)
            if "metrics" in record:
                shown += "  |  " + _shown(record["metrics"])
            with tqdm.external_write_mode():
                logger.info("epoch %d/%d  %s", epoch + 1, config.epochs, shown)

    def _evaluate(self, evaluate: Evaluate) -> dict[str, float]:
        state = random_state(self.accelerator.device)
        if self.accelerator.num_processes > 1:
            # Each process updates buffers (running statistics) by its own batches; the main one's count.
            for buffer in self.weights.buffers():
                import_training_extra("accelerate.utils").broadcast(buffer)
        self.weights.eval()
        metrics = {name: float(value) for name, value in evaluate(self.weights, self.accelerator).items()}
        set_random_state(state, self.accelerator.device)
        return gather_objects(self.accelerator, metrics)[0]

    def _select(self, epoch: int, metrics: Mapping[str, float]) -> None:
        name = self.config.select_by
        if name == "last":
            return
        if name not in metrics:
            close = difflib.get_close_matches(name, metrics, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            raise InputError(f"select_by {name}: no such metric; {hint}known: last, {', '.join(metrics)}")
        value = metrics[name]
        sign = 1 if self.config.select_mode == "max" else -1
        if math.isfinite(value) and (self.best is None or sign * value > sign * self.best["value"]):
            self.best = {"epoch": epoch + 1, "metric": name, "value": value}
            self._save_model("best")

    def _where(self) -> dict[str, Any]:
        return {"epoch": self.epoch + 1, "step": self.updates, "lr": self._lr()}

    def _lr(self) -> float:
        groups: list[dict[str, Any]] = self.optimizer.param_groups
        group = max(groups, key=lambda group: group.get("lr_scale", 1.0))
        return group["lr"] / (group.get("lr_scale", 1.0) or 1.0)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.began

    # --- Files: written by the main process, a failure is everyone's ---

    def _record(self, record: dict[str, Any]) -> None:
        self.history.append(record)
        lines = "".join(json.dumps(line, allow_nan=False) + "\n" for line in self.history)
        self._on_main(lambda: write_text(self.folder / "history.jsonl", lines))

    def _save_model(self, name: str) -> None:
        save_model = self.save_model
        if save_model is None:
            return

        def save() -> None:
            with atomic_folder(self.folder / name) as temporary, disk_errors():
                save_model(self.weights, temporary)

        self._on_main(save)

    def _save(self) -> None:
        self._read_losses()
        states = gather_objects(self.accelerator, random_state(self.accelerator.device))
        scaler: Any = self.accelerator.scaler
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "updates": self.updates,
            "seconds": self._seconds(),
            "best": self.best,
            "means": self.means.sums,
            "history": self.history,
            "config": plain_values(self.config),
            "images": self.steps.images,
            "processes": self.accelerator.num_processes,
        }
        self._on_main(
            lambda: save_checkpoint(
                self.checkpoints,
                self.updates,
                model=self.bare,
                ema=None if self.ema is None else self.ema.module,
                optimizer=self.optimizer.state_dict(),
                scaler=None if scaler is None else scaler.state_dict(),
                random_states=states,
                state=state,
                keep=self.config.keep_checkpoints,
            )
        )
        self.saved_at = self.updates

    def _on_main(self, action: Callable[[], Any]) -> None:
        message: str | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except InputError as error:
                message = str(error)
        if (told := gather_objects(self.accelerator, message)[0]) is not None:
            raise InputError(told)

    def resume(self) -> None:
        """Take up the newest checkpoint where there is one."""
        accelerator = self.accelerator
        checkpoints = list_checkpoints(self.checkpoints)
        newest = gather_objects(accelerator, checkpoints[-1] if checkpoints else None)[0]
        if newest is None:
            if accelerator.is_main_process:
                logger.info("%s: no checkpoint yet, training from the beginning", self.folder)
            return
        state = read_checkpoint_state(newest)
        if state["processes"] != accelerator.num_processes:
            raise InputError(
                f"{newest}: written by {state['processes']} processes, now {accelerator.num_processes}; "
                f"launch with --num_processes {state['processes']}"
            )
        check_same_run(newest, state["config"], plain_values(self.config), self._may_change())
        if state["images"] != self.steps.images:
            raise InputError(
                f"{newest}: trained on {state['images']} images, the data have {self.steps.images}; give the "
                "same data or start a new run in another folder"
            )
        ema = None if self.ema is None else self.ema.module
        optimizer, scaler, states = load_checkpoint(newest, model=self.bare, ema=ema)
        self.optimizer.load_state_dict(optimizer)
        if scaler is not None:
            scaler_now: Any = accelerator.scaler
            scaler_now.load_state_dict(scaler)
        self.epoch, self.step, self.updates = state["epoch"], state["step"], state["updates"]
        self.best, self.history, self.means.sums = state["best"], state["history"], state["means"]
        self.seconds_before, self.saved_at = state["seconds"], self.updates
        mine: RandomState = states[accelerator.process_index]
        set_random_state(mine, accelerator.device)
        if accelerator.is_main_process:
            logger.info("%s: resumed at step %d", newest, self.updates)

    def _may_change(self) -> frozenset[str]:
        # A longer run repeats a shorter one exactly where the learning rate does not depend on the end. Of
        # its own schedule a package must say so, by adding "epochs" to the fields that may change.
        open_ended = self.configured_schedule and self.config.schedule in {"constant", "step", "multistep"}
        return self.config.may_change_on_resume | ({"epochs"} if open_ended else set())


class _Means:
    """Means over images since the last log and in the epoch, as sums that a checkpoint can hold."""

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, float]] = {"log": {}, "epoch": {}}

    def add(self, images: int, means: Mapping[str, float]) -> None:
        """Add one optimizer step: means over its images."""
        for sums in self.sums.values():
            sums["images"] = sums.get("images", 0) + images
            for name, value in means.items():
                sums[f"{name}_sum"] = sums.get(f"{name}_sum", 0.0) + images * value

    def take(self, since: Literal["log", "epoch"]) -> dict[str, float]:
        """Means of a window, which then begins anew; empty if it had no image."""
        sums, self.sums[since] = self.sums[since], {}
        images = sums.pop("images", 0)
        return {name.removesuffix("_sum"): value / images for name, value in sums.items()}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    def moved(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    return {
        name: [moved(entry) for entry in value] if isinstance(value, list) else moved(value)
        for name, value in batch.items()
    }


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(numbers: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {'-' if value is None else f'{value:.4g}'}" for name, value in numbers.items())
