"""run.py: what only `main()` needs. Teachers on demand, flags and presets, the run folder, checkpoints, exact resume.

A run folder holds log.jsonl (one JSON object a line, appended), samples.png, student.pt, checkpoint.pt and checkpoint.prev.pt.
Every file but the log is written under a temporary name and renamed: a kill at any moment leaves a whole one. A log that ran
ahead of its checkpoint is cut back on resume. `distill` itself needs none of this: `run=None` works.
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import textwrap
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

from common import (DATASETS, BadInput, DataSpec, Means, Shuffled, accuracy, agreement, augment, autocast, cosine, dataset_names,
                    expected_calibration_error, frozen, load_dataset, normalize, predict, seeded, set_lr, steps)
from models import build_model, check_model_name, foreign_model

SAVE_EVERY = 60.0     # seconds between checkpoints
RUN_FORMAT = 1        # raised when checkpoints of an older version can no longer be continued
CLASSIFIER_FORMAT = "distillation-classifier-1"
STAGES = ("bank", "generator", "pool", "teacher")      # events of what is made once for all students: with counters and seconds, as epochs
_signals = []         # SIGINT or SIGTERM that came: the next `tick` saves and stops


class Stopped(Exception):
    """Asked to stop by a signal; the state is saved."""


# ---------------------------------------------------------------------------------------------------- files and state
def write_atomically(path, write):
    """`write(file)` into a temporary file beside `path`, fsync, rename: `path` is whole at every moment, old or new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, what):
    """The dict in a file of torch.save, read without running code from it; damage and other content raise BadInput."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {**content}
    except Exception as error:
        raise BadInput(f"{path} is not a readable {what} ({type(error).__name__}): damaged, or not of this project") from None


def require_same(saved, wanted, path, advice):
    """Raises BadInput naming the first entry in which two dicts differ."""
    for key in [*wanted, *saved]:
        if key not in saved or key not in wanted or saved[key] != wanted[key]:
            raise BadInput(f"{path} was made with {key} = {saved.get(key)}, this command has {key} = {wanted.get(key)}; {advice}")


class Progress:
    """Keeps the state of a long computation in one file (and the one before it), so that a killed one can be continued.

    `state` is one dict. What has a state_dict (modules, optimizers, Means, Shuffled ...) is loaded, tensors are filled in
    place, torch.Generators are set, numbers are replaced. `identity` is compared; a difference is refused by name.
    """
    last_saved = None      # of whichever Progress saved last, for messages

    def __init__(self, path, identity, run=None):
        self.path, self.previous = Path(path), Path(path).with_name(Path(path).stem + ".prev.pt")
        self.identity, self.rows, self.run, self.state = {"format": RUN_FORMAT, **identity}, [], run, {}
        self.began = self.saved_at = time.monotonic()
        self.seconds_before, self.whole = 0.0, False     # whole: the file at `path` was read or written whole by this process

    def load(self):
        """The newest readable checkpoint of this identity; None if there is no checkpoint at all."""
        found = [path for path in (self.path, self.previous) if path.exists()]
        for path in found:
            try:
                saved = read_file(path, "checkpoint")
                if not {"identity", "state", "rows", "seconds", "rng", "cuda_rng"} <= set(saved):
                    raise BadInput(f"{path} is not a checkpoint of this project")
            except BadInput as error:
                print(f"warning: {error}; trying the one before it", file=sys.stderr)
                continue
            require_same(saved["identity"], self.identity, path, "type the settings of then, or start anew elsewhere, or move it away")
            self.whole = path == self.path
            return saved
        if found:
            raise BadInput(f"no readable checkpoint is left in {self.path.parent}; start anew in another folder")
        return None

    def restore(self, state):
        """Call once, when everything is built: `state` becomes what was saved, if anything was."""
        self.state, saved = state, self.load()
        if saved is None:
            return
        if set(saved["state"]) != set(state):
            raise BadInput(f"{self.path} holds the state of another version of this program; start anew in another folder")
        for key, value in saved["state"].items():
            if isinstance(state[key], torch.Generator):
                state[key].set_state(value)
            elif hasattr(state[key], "load_state_dict"):
                state[key].load_state_dict(value)
            elif torch.is_tensor(state[key]):
                state[key].data.copy_(value)
            else:
                state[key] = value
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and len(saved["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        self.rows[:], self.seconds_before, Progress.last_saved = saved["rows"], saved["seconds"], self.path
        if self.run:
            self.run.replay(self.rows)

    def tick(self, state):
        """Call at every step boundary. Saves when a minute has passed or a signal came; the latter also stops."""
        if _signals or time.monotonic() - self.saved_at >= SAVE_EVERY:
            self.save(state)
        if _signals:
            raise Stopped(f"saved in {self.path}")

    def save(self, state):
        for value in state.values():
            if isinstance(value, Means):
                value.check()                  # a state that holds a NaN is not worth keeping
        packed = {key: value.get_state() if isinstance(value, torch.Generator)
                  else value.state_dict() if hasattr(value, "state_dict")
                  else value.detach() if torch.is_tensor(value) else value for key, value in state.items()}
        content = dict(identity=self.identity, state=packed, rows=self.rows, seconds=self.seconds(), rng=torch.get_rng_state(),
                       cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])
        if self.whole:                         # a damaged file must not push out the good one before it
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path, self.previous)
        write_atomically(self.path, lambda file: torch.save(content, file))
        self.saved_at, self.whole, Progress.last_saved = time.monotonic(), True, self.path

    def seconds(self):
        """Since the computation began, the pauses between its sessions left out."""
        return self.seconds_before + time.monotonic() - self.began

    def counters(self):
        """The state's cumulative counters, and the seconds that each of its loops took since the last call."""
        row = {key: self.state[key] for key in ("images_synthesized", "student_steps", "teacher_queries") if key in self.state}
        for key in [key for key in self.state if key.startswith("seconds_")]:
            row[key], self.state[key] = round(self.state[key], 3), 0.0
        return row

    def report(self, **row):
        """Keep one row, a stage's with the counters; a run that waits for this computation logs it too."""
        self.rows.append({**row, **self.counters()} if row.get("event") in STAGES else row)
        if self.run:
            self.run.report(**self.rows[-1])

    def forget(self):
        """Remove the files: the result is kept elsewhere by now."""
        self.path.unlink(missing_ok=True)
        self.previous.unlink(missing_ok=True)


def command_line(main):
    """Decorates `main(argv=None)`. Bad input: one sentence on stderr, status 2. Ctrl-C and SIGTERM: save, then 128 + signal."""
    @functools.wraps(main)
    def wrapped(argv=None):
        def remember(number, frame):
            if _signals:
                raise KeyboardInterrupt        # a second Ctrl-C does not wait for the end of the step
            _signals.append(number)
            os.write(2, b" stopping at the end of this step; once more to stop at once\n")      # print is not safe in a handler
        _signals.clear()
        Progress.last_saved = None
        before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return main(argv)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except FloatingPointError as error:
            print(f"stopped: {error}; last good checkpoint: {Progress.last_saved or 'none yet'}", file=sys.stderr)
            raise SystemExit(1) from None
        except (Stopped, KeyboardInterrupt) as stopped:
            print(f"stopped by signal {_signals[0]}; {str(stopped) or f'last checkpoint: {Progress.last_saved}'}", file=sys.stderr)
            raise SystemExit(128 + _signals[0]) from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return wrapped


# ----------------------------------------------------------------------------------------------------------- teachers
class Teacher(NamedTuple):
    model: nn.Module
    data: DataSpec
    name: str          # stem of its file; what is derived from this teacher is named after it
    sha256: str        # of the file, or of the weights of a network that has none


# epochs, batch size. With BN: SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to 0. Users of the published recipe (decay 1e-4,
# three steps) report CIFAR-10 teachers 1 to 3 points under the published ones. Without BN: Adam 1e-3, cosine, no decay.
RECIPES = {"digits": (40, 128), "mnist": (10, 256), "mnist28": (10, 256), "fashion_mnist": (20, 256),
           "fashion_mnist28": (20, 256), "svhn": (100, 128), "cifar10": (200, 128), "cifar100": (200, 128), "folder": (100, 128)}


def recipe_of(arch, dataset, epochs=None, batch_size=None):
    """How `arch` is trained on `dataset`: a dict that goes into the teacher's file and is compared when the file is reused."""
    if dataset.partition(":")[0] not in RECIPES:
        raise BadInput(f"no teacher is trained on {dataset} here; name a file, or type --teacher torchvision:resnet50")
    usual_epochs, usual_batch = RECIPES[dataset.partition(":")[0]]
    plain = re.fullmatch("lenet5(_half)?", arch)
    return dict(epochs=epochs or usual_epochs, batch_size=batch_size or usual_batch, optimizer="adam" if plain else "sgd",
                lr=1e-3 if plain else 0.1, weight_decay=0.0 if plain else 5e-4, schedule="cosine")


def train_teacher(arch, dataset, path, settings, device, recipe):
    """Train `arch` on the real training set, always seed 0, and keep it in `path`. A killed training goes on where it was."""
    test, _ = load_dataset(dataset, False, settings.data_dir, device)
    train, data = load_dataset(dataset, True, settings.data_dir, device)
    with seeded(0):
        model = build_model(arch, data.num_classes, data.image_shape).to(device, memory_format=torch.channels_last)
    rng = torch.Generator(device).manual_seed(0)
    optimizer = (torch.optim.Adam(model.parameters(), recipe["lr"]) if recipe["optimizer"] == "adam" else torch.optim.SGD(
        model.parameters(), recipe["lr"], momentum=0.9, weight_decay=recipe["weight_decay"]))
    state = dict(model=model, optimizer=optimizer, rng=rng, batches=Shuffled(rng), means=Means("loss", device=device), epoch=0,
                 training_step=0, seconds_training=0.0)
    print(f"training teacher {arch} on {dataset}: {recipe} -> {path}", flush=True)
    keeper = Progress(path.with_suffix(".partial.pt"), dict(arch=arch, dataset=dataset, threads=settings.threads,
                                                                  precision=settings.precision, **recipe))
    keeper.restore(state)
    for epoch in range(state["epoch"], recipe["epochs"]):
        set_lr(optimizer, cosine(recipe["lr"], epoch, recipe["epochs"]))
        model.train()
        for _ in steps(state, "training", math.ceil(len(train.labels) / recipe["batch_size"]), keeper):
            batch = state["batches"].next(len(train.labels), recipe["batch_size"])
            images = normalize(augment(train.pixels[batch] / train.scale, data, rng), data)
            with autocast(settings, device):
                logits = model(images)
            loss = F.cross_entropy(logits.float(), train.labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state["means"].add(loss)
        state.update(epoch=epoch + 1, training_step=0)
        loss = state["means"].take()["loss"]
        if (epoch + 1) % max(1, recipe["epochs"] // 5) == 0:
            print(f"teacher epoch {epoch + 1:4d}/{recipe['epochs']}   loss {loss:.4f}   {keeper.seconds():.0f} s", flush=True)
    test_acc = accuracy(predict(model, test, data), test.labels)
    if not path.exists():      # another process may have trained the same teacher meanwhile; what is there is never replaced
        save_classifier(path, model, arch, data, dataset, recipe=recipe, seed=0, test_acc=test_acc, seconds=keeper.seconds(),
                        device=device_name(device), precision=settings.precision)
    keeper.forget()


def save_classifier(path, model, arch, data, dataset, **more):
    """One file with all that a data-free student may know: weights, architecture, `data`, recipe, test accuracy, versions."""
    content = dict(format=CLASSIFIER_FORMAT, weights=model.state_dict(), arch=arch, data=data._asdict(), dataset=dataset,
                   versions=versions(), **more)
    write_atomically(path, lambda file: torch.save(content, file))


def read_classifier(path):
    """The content of a file of `save_classifier`, checked. Raises BadInput if it is missing, damaged or something else."""
    if not Path(path).is_file():
        raise BadInput(f"there is no teacher file {path}; give a file, a model name as in --teacher resnet34, or module:function")
    content = read_file(path, "teacher file")
    try:
        data = DataSpec(**content["data"])
        channels, height, width = data.image_shape
        sane = (content["format"] == CLASSIFIER_FORMAT and isinstance(content["dataset"], str) and 2 <= data.num_classes <= 100_000
                and 1 <= channels <= 16 and 1 <= height <= 1024 and 1 <= width <= 1024 and 0 <= data.crop <= height
                and len(data.mean) == len(data.std) == channels and min(data.std) > 0 and set(content["weights"]) != set())
        check_model_name(content["arch"])
    except (KeyError, TypeError, ValueError, AttributeError):
        sane = False
    if not sane:
        raise BadInput(f"{path} is not a teacher file of this project; make one with: python common.py --model NAME --dataset NAME")
    return content


def load_teacher(settings, device):
    """The network that `--teacher` names: a file, a model name (trained if need be), torchvision:NAME or module:function."""
    wanted = settings.teacher
    if ":" in wanted and not is_file_name(wanted):
        data = dataset_spec(settings)
        model = foreign_model(wanted, data.num_classes, pretrained=True).to(device)
        name, digest = re.sub(r"\W+", "_", wanted), hashlib.sha256()
        for key, value in sorted(model.state_dict().items()):
            digest.update(key.encode() + value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        sha256 = digest.hexdigest()
    else:
        path = Path(wanted)
        if not is_file_name(wanted):
            path = teacher_path(settings.dataset, wanted)
            recipe = recipe_of(wanted, settings.dataset)
            if not path.exists():
                train_teacher(wanted, settings.dataset, path, settings, device, recipe)
            file = read_classifier(path)
            found = file.get("recipe")
            if file["dataset"] != settings.dataset:
                raise BadInput(f"{path} was trained on {file['dataset']}, not on {settings.dataset}; move it away, or name a file")
            if found != recipe:
                raise BadInput(f"{path} was trained with {found}, the recipe is {recipe}; to use that file as it is, type "
                               f"--teacher {path}; to train by the recipe, move it away")
        file, name, sha256 = read_classifier(path), path.stem, hashlib.sha256(path.read_bytes()).hexdigest()
        data = DataSpec(**file["data"])
        model = build_model(file["arch"], data.num_classes, data.image_shape).to(device, memory_format=torch.channels_last)
        try:
            model.load_state_dict(file["weights"])
        except (RuntimeError, AttributeError, TypeError) as error:
            raise BadInput(f"the weights in {path} do not fit {file['arch']}: {' '.join(str(error).split())[:160]}") from None
    if settings.dataset != "none":
        asked = dataset_spec(settings)
        for what, here, there in (("classes", data.num_classes, asked.num_classes),
                                  ("image shape", tuple(data.image_shape), asked.image_shape)):
            if here != there:
                raise BadInput(f"teacher {wanted} is for {what} {here}, data set '{settings.dataset}' has {there}; "
                               "name the data set that the teacher was trained on with --dataset")
    check_answers(model, f"teacher {wanted}", data, device)
    return Teacher(model.eval(), data, name, sha256)


def check_answers(model, name, data, device):
    """Raises BadInput unless the network turns images of this shape into finite logits (N, K)."""
    try:
        with torch.no_grad(), frozen(model):
            logits = model(torch.zeros(2, *data.image_shape, device=device))
        fits = logits.shape == (2, data.num_classes) and bool(logits.isfinite().all())
    except Exception as error:
        raise BadInput(f"{name} does not take images of shape {data.image_shape} ({' '.join(str(error).split())[:160]})") from None
    if not fits:
        raise BadInput(f"{name} does not answer images of shape {data.image_shape} with finite logits (N, {data.num_classes})")


def teacher_path(dataset, arch):
    """checkpoints/<dataset>_<name>.pt, where every method looks for the teacher of that name."""
    return Path("checkpoints", f"{re.sub(r'[^A-Za-z0-9_@-]+', '_', dataset)}_{arch}.pt")


def dataset_spec(settings):
    """The DataSpec of `settings.dataset`."""
    if settings.dataset.startswith("folder:"):
        return load_dataset(settings.dataset, True)[1]
    if settings.dataset not in DATASETS:
        raise BadInput(f"unknown data set '{settings.dataset}'; choose from {dataset_names()}")
    return DATASETS[settings.dataset]


def is_file_name(name):
    return name.endswith(".pt") or "/" in name


# -------------------------------------------------------------------------------------------------- flags and presets
PAIRS = {"digits": ("wrn16_2", "wrn16_1"), "svhn": ("wrn40_2", "wrn16_1"), "imagenet": ("torchvision:resnet50", "torchvision:resnet18"),
         **dict.fromkeys(("mnist", "mnist28", "fashion_mnist", "fashion_mnist28"), ("lenet5", "lenet5_half"))}   # else resnet34, resnet18


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message + "; --help lists the flags")


def _number(kind, positive, below=math.inf):
    """An argparse type: a finite int or float, above 0 if `positive`, else at least 0, and under `below`."""
    def convert(text):
        value = kind(text)
        if value >= below:
            raise argparse.ArgumentTypeError(f"must be under {below}, not {text}")
        if not math.isfinite(value) or value < 0 or (positive and value == 0):
            raise argparse.ArgumentTypeError(f"must be {'above' if positive else 'at least'} 0, not {text}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"      # argparse names it: invalid whole number value: 'x'
    return convert


def _shared_flags(parser):
    parser.add_argument("--data-dir", default="data", help="where the data sets are, or are downloaded to [data]")
    parser.add_argument("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    parser.add_argument("--precision", choices=["fp32", "tf32", "bf16"], help="of forward passes [tf32 on CUDA, else fp32]")
    parser.add_argument("--deterministic", action="store_true", help="bit-equal runs on CUDA too, slower")
    parser.add_argument("--threads", type=_number(int, True), help="CPU threads [as PyTorch chooses]")


def read_settings(argv, method, doc, presets, flags, own=None, pairs=None):
    """The command line as one namespace: preset first, then flags. Raises BadInput for what can be refused without work.

    `flags`: {name: help} of the method's settings, whose types and defaults come from the presets; (help, choices) where it is
    one of a few words. `own`: {name: help} of flags that hold a text and are no part of a preset. `pairs`: {data set: (teacher, student)}
    where the method has its own.
    """
    parser = _Parser(prog=f"{method}.py", description=doc.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--teacher", help="model name (trained if need be), file, torchvision:NAME, module:function [the set's pair]")
    parser.add_argument("--student", help="model name, torchvision:NAME or module:function [the data set's pair]")
    parser.add_argument("--dataset", help=f"{dataset_names()} [cifar10]")
    parser.add_argument("--preset", help=f"{', '.join(presets)} [by data set and pair]")
    parser.add_argument("--out", help=f"run folder [the next free runs/{method}-DATASET-001]")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out; repeat its other flags")
    parser.add_argument("--seed", type=_number(int, False, 2 ** 32), default=0, help="of student and synthesis; the teacher's is 0 [0]")
    parser.add_argument("--eval-every", type=_number(int, True), default=1, help="epochs between evaluations [1]")
    parser.add_argument("--compile", action="store_true", help="torch.compile for the networks (CUDA)")
    parser.add_argument("--teacher-last-map", default="", help="layer whose input is the last feature map, for a foreign teacher")
    parser.add_argument("--student-last-map", default="", help="the same for a foreign student")
    _shared_flags(parser)
    for name, text in (own or {}).items():
        parser.add_argument("--" + name.replace("_", "-"), default="", help=text)
    for name, text in {"epochs": "epochs", "batch_size": "the student's batch size", **flags}.items():
        values = {key: preset[name] for key, preset in presets.items()}
        kind, few = type(next(iter(values.values()))), len(set(values.values())) == 1
        shown = next(iter(values.values())) if few else ", ".join(f"{key} {value}" for key, value in values.items())
        text, choices = (text, None) if isinstance(text, str) else text
        above_0 = "0 = " not in text if kind is int else name.startswith("lr_") or name == "temperature"
        how = (dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(choices=choices) if kind is str else
               dict(type=_number(kind, above_0)))
        parser.add_argument("--" + name.replace("_", "-"), help=f"{text} [{shown}]".replace("%", "%%"), **how)
    args = parser.parse_args(argv)

    of_preset = (args.preset or "").split("-")
    file = read_classifier(args.teacher) if args.teacher and is_file_name(args.teacher) else {}
    if args.preset and args.preset not in presets:
        raise BadInput(f"{method} has no preset '{args.preset}'; choose from {', '.join(presets)}")
    args.dataset = args.dataset or (of_preset[0] if of_preset[0] in DATASETS else file.get("dataset", "cifar10"))
    if args.dataset not in (*DATASETS, "none") and not args.dataset.startswith("folder:"):
        raise BadInput(f"unknown data set '{args.dataset}'; choose from {dataset_names()}")
    if args.dataset == "none" and not file:
        raise BadInput("--dataset none needs a --teacher file: without a data set only the file knows shape and normalisation")
    numbers_of = file.get("dataset", args.dataset) if args.dataset == "none" else args.dataset
    pair = of_preset[1:] if len(of_preset) == 3 else {**PAIRS, **(pairs or {})}.get(numbers_of, ("resnet34", "resnet18"))
    args.teacher, args.student = args.teacher or pair[0], args.student or pair[1]
    for name in [args.student] if is_file_name(args.teacher) else [args.teacher, args.student]:
        if ":" not in name:
            check_model_name(name)
    exact = f"{numbers_of}-{file.get('arch', args.teacher)}-{args.student}"
    args.preset = args.preset or (exact if exact in presets else numbers_of)
    if args.preset not in presets:
        raise BadInput(f"{method} has no preset for data set '{numbers_of}'; take another's numbers with --preset: {', '.join(presets)}")
    for name, value in presets[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.resume and not args.out:
        raise BadInput("--resume needs --out FOLDER, the folder of the run to go on with")
    return args


def set_up_device(settings):
    """torch.device of `--device`; fills in device, precision and threads, and sets PyTorch's global switches."""
    wanted = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise BadInput(f"unknown device '{wanted}'; choose cpu, cuda or cuda:N")
    if wanted != "cpu" and int(wanted.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise BadInput(f"there is no device '{wanted}' here ({torch.cuda.device_count()} CUDA devices); type --device cpu")
    settings.device, settings.precision = wanted, settings.precision or ("fp32" if wanted == "cpu" else "tf32")
    if wanted == "cpu" and (settings.precision == "tf32" or getattr(settings, "compile", False)):
        raise BadInput("tf32 and --compile are for CUDA; leave them out on a CPU")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    settings.threads = torch.get_num_threads()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = settings.precision != "fp32"
    torch.backends.cudnn.benchmark = not settings.deterministic      # shapes are static: let cuDNN try its algorithms once
    if settings.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(settings.deterministic)
    return torch.device(wanted)


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__), "torchvision": str(torchvision.__version__)}


def device_name(device):
    """'NVIDIA H200', or the CPU's name and the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


# --------------------------------------------------------------------------------------------------------- the folder
def stored_stage(run, settings, what, path, shaped_by, make):
    """What is made once for all students of a teacher: read from `path`, or made by `make(progress)` now and kept there.

    `what`: its name, as in 'image bank'. `shaped_by`: the settings that a file at `path` must have been made with.
    `make` returns a dict of tensors and numbers; so does this function.
    """
    path = Path(path)
    made_with = dict(format=f"{run.method}-{what.split()[-1]}-2", teacher_sha256=run.teacher.sha256, **run.data._asdict(),
                     **{key: getattr(settings, key) for key in shaped_by})
    keeper = Progress(path.with_suffix(".partial.pt"), {**made_with, "threads": settings.threads}, run)
    if path.exists():
        content = read_file(path, what)
        require_same(content.get("made_with", {}), made_with, path, f"name another file with --{what.split()[-1]}, or move this one away")
        run.begin()
        run.replay(content["rows"])
        print(f"stage 1: {what} from {path}", flush=True)
        keeper.forget()                                        # of a process that was killed before it could
        return content["result"]
    print(f"stage 1: {what} -> {path}", flush=True)
    keeper.load()                                              # refuses a half-made one of other settings
    run.begin()
    result = make(keeper)
    if not path.exists():                                      # another process may have made the same one meanwhile
        write_atomically(path, lambda file: torch.save(dict(made_with=made_with, rows=keeper.rows, result=result), file))
    keeper.forget()
    return result


class Run(Progress):
    """The run folder and the pace of a run; built by main() alone. `teacher`, `student` and `data` are for `distill`.

    Whatever can be refused is refused before the folder is made. The test set is seen by this class alone.
    """
    def __init__(self, method, settings, scored=True):
        device = set_up_device(settings)
        self.settings, self.device, self.method = settings, device, method
        self._check_folder()
        self.test, self.data = None, None
        if settings.dataset == "none":
            self.data = DataSpec(**read_classifier(settings.teacher)["data"])
        elif not scored or settings.dataset == "imagenet":   # no test set to see
            self.data = dataset_spec(settings)
        else:
            self.test, self.data = load_dataset(settings.dataset, False, settings.data_dir, device)
        with seeded(settings.seed):                          # before the teacher, whose training may take hours
            self.student = build_model(settings.student, self.data.num_classes, self.data.image_shape)
        self.student.to(device, memory_format=torch.channels_last)
        check_answers(self.student, f"student {settings.student}", self.data, device)
        self.teacher = load_teacher(settings, device)
        self.data = self.teacher.data
        if settings.compile:
            compile_networks(self.teacher.model, self.student)
        may_differ = ("device", "data_dir", "out", "resume", "teacher")
        identity = {key: value for key, value in vars(settings).items() if key not in may_differ}
        identity.update(method=method, teacher_sha256=self.teacher.sha256)
        super().__init__(Path(settings.out or "runs", "checkpoint.pt"), identity)
        found = self.load() if settings.resume else None
        self.teacher_logits = predict(self.teacher.model, self.test, self.data) if self.test else None
        self.teacher_acc = accuracy(self.teacher_logits, self.test.labels) if self.test else None
        self.folder, self.columns, self.resumes = None, None, found is not None

    def begin(self):
        """Make the folder, print and log what holds. Comes by itself with the first row or state, if nobody calls it before."""
        self.folder = self._make_folder()
        self.path, self.previous = self.folder / "checkpoint.pt", self.folder / "checkpoint.prev.pt"
        first = dict(event="resume" if self.resumes else "start", method=self.method, arguments=dict(vars(self.settings)),
                     versions=versions(), device=device_name(self.device), teacher_sha256=self.teacher.sha256,
                     teacher_acc=self.teacher_acc)
        print(textwrap.fill(" ".join(f"{key}={value}" for key, value in sorted(vars(self.settings).items()) if value not in ("", None)),
                            118, initial_indent=f"{self.method}: ", subsequent_indent="    "))
        print(f"teacher {self.teacher.name}: test accuracy {_shown(self.teacher_acc)}; student {self.settings.student}; "
              f"{first['device']}; {self.folder}", flush=True)
        self.resume_row = first if self.resumes else None    # a resumed log waits for the state, which knows its rows
        for leftover in self.folder.glob(".*.tmp"):          # of a session that was killed while it wrote
            leftover.unlink()
        if not self.resumes:
            log = self.folder / "log.jsonl"
            if self.settings.resume:                         # nothing was saved yet: from the beginning
                log.unlink(missing_ok=True)
            try:
                open(log, "x").close()
            except FileExistsError:
                raise BadInput(f"{self.folder} holds a run already, begun a moment ago; name another folder") from None
            self.report(**first)

    def _check_folder(self):
        out = self.settings.out
        if out and not self.settings.resume and any(Path(out, name).exists() for name in (
                "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "student.pt", "samples.png", "images.pt")):
            raise BadInput(f"{out} holds a run already; name another folder, or go on with it by --resume")
        if out and Path(out, "log.jsonl").is_file() and '"event": "end"' in Path(out, "log.jsonl").read_text():
            raise BadInput(f"the run in {out} is finished; its result is the last line of {Path(out, 'log.jsonl')}")
        folder = Path(out or "runs").absolute()
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise BadInput(f"{out or 'runs'} cannot be a run folder: {folder} is {'read-only' if folder.is_dir() else 'a file'}")

    def _make_folder(self):
        if self.settings.out:
            Path(self.settings.out).mkdir(parents=True, exist_ok=True)
            return Path(self.settings.out)
        number = 1
        while True:        # mkdir, not exists: two runs started together must not get one folder
            try:
                folder = Path("runs", f"{self.method}-{self.settings.dataset.partition(':')[0]}-{number:03d}")
                folder.mkdir(parents=True)
                return folder
            except FileExistsError:
                number += 1

    def restore(self, state):
        if self.folder is None:
            self.begin()
        super().restore(state)
        if self.resume_row:                                  # the log becomes what it was at the checkpoint, plus this row
            resume_row, self.resume_row = self.resume_row, None
            text = "".join(json.dumps(row) + "\n" for row in self.rows)
            write_atomically(self.folder / "log.jsonl", lambda file: file.write(text.encode()))
            self.report(**resume_row)

    def replay(self, rows):
        """Log rows that an earlier stage reported once, when its result was made; its seconds count as this run's."""
        for row in rows:
            self.seconds_before += sum(value for key, value in row.items() if key.startswith("seconds_"))
            self._log(row)
            if "text" in row:
                print(f"{row['event']}, then: {row['text']}", flush=True)

    def _log(self, row):
        if self.folder is None:
            self.begin()
        if self.resume_row is None:                          # else the checkpoint's own rows hold it
            self.rows.append(row)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")

    def report(self, event="epoch", samples=None, **row):
        """One row of log.jsonl and one line on the screen; scores the student where an epoch is to be scored.

        `samples`: pixels (K, n, C, H, W) uint8, drawn as samples.png with one row a class.
        """
        row = {"event": event, **row}
        if event == "epoch":
            row.update(student_acc=None, agreement=None, seconds_evaluation=0.0)
            last = row["epoch"] == self.settings.epochs - 1
            if self.test and (last or (row["epoch"] + 1) % self.settings.eval_every == 0):
                began = time.perf_counter()
                logits = predict(self.student, self.test, self.data)
                row.update(student_acc=accuracy(logits, self.test.labels), agreement=agreement(logits, self.teacher_logits),
                           seconds_evaluation=round(time.perf_counter() - began, 3))
        if event in ("epoch", *STAGES):
            row.update(self.counters())
        if samples is not None:
            save_samples(self.folder / "samples.png", samples)
        self._log(row)
        if event in ("epoch", *STAGES):
            self._print(row)
        elif "text" in row:
            print(f"{event}: {row['text']}", flush=True)

    def _print(self, row):
        """One aligned line; the names again whenever they change. Zeros (terms that are off) and counters are in the log only."""
        seconds = sum(value for key, value in row.items() if key.startswith("seconds_"))
        self.terms = {key.removeprefix("loss_") for key in row if key.startswith("loss_")}
        row = {key.removeprefix("loss_"): value for key, value in {**row, "seconds": round(seconds, 1)}.items() if key not in
               ("event", "images_synthesized", "student_steps", "teacher_queries") and not key.startswith("seconds_")}
        if not self.columns or row.keys() != self.columns[0]:
            self.columns = row.keys(), [key for key in row if row[key] != 0 or key not in self.terms]
            print(" ".join(f"{key:>{max(8, len(key))}s}" for key in self.columns[1]))
        print(" ".join(f"{_shown(row[key]):>{max(8, len(key))}s}" for key in self.columns[1]), flush=True)

    def finish(self, result=None):
        """Score the last epoch's student, write the last checkpoint, student.pt and then the end row; print the result.

        In this order: whoever is killed in between resumes from the checkpoint and ends the same; with the end row all is there.
        `result`: what came out of a run that trained no student, a line for the screen.
        """
        self.save(self.state)
        cost = dict(seconds=round(self.seconds(), 1), peak_memory_mb=peak_memory_mb(self.device))
        if result:
            self._log(dict(event="end", teacher_acc=self.teacher_acc, **cost))
            print(f"{result}, {cost['seconds']:.0f} s", flush=True)
            return
        epochs = [row for row in self.rows if row["event"] == "epoch"]
        scores = [row["student_acc"] for row in epochs if row["student_acc"] is not None]
        logits = predict(self.student, self.test, self.data) if self.test else None
        row = dict(event="end", teacher_acc=self.teacher_acc, student_acc_last=epochs[-1]["student_acc"],
                   student_acc_best=max(scores, default=None), agreement=epochs[-1]["agreement"],
                   ece=expected_calibration_error(logits, self.test.labels) if self.test else None, **cost)
        save_classifier(self.folder / "student.pt", self.student, self.settings.student, self.data, self.settings.dataset,
                        test_acc=row["student_acc_last"], teacher_sha256=self.teacher.sha256, method=self.method)
        self._log(row)
        print(f"last epoch: student {_shown(row['student_acc_last'])}, teacher {_shown(self.teacher_acc)}, agreement "
              f"{_shown(row['agreement'])}, calibration error {_shown(row['ece'])}, {row['seconds']:.0f} s   [best epoch, chosen on "
              f"the test set: {_shown(row['student_acc_best'])}]   {self.folder}", flush=True)


def _shown(value):
    """For the screen: '-' for None, four digits after the point, fewer for large numbers."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)


def compile_networks(*models, backend="inductor"):
    """torch.compile in place; state_dicts keep their names. Hooks come and go here, so the compiled code must look for them."""
    import torch._dynamo
    torch._dynamo.config.skip_nnmodule_hook_guards = False
    for model in models:
        model.compile(backend=backend)


def peak_memory_mb(device):
    """Most memory held so far: on CUDA by PyTorch's tensors, else by the process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    try:
        import resource
    except ImportError:        # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10))


def save_samples(path, samples, labels=None):
    """samples (K, n, C, H, W) uint8 -> a PNG, one row a class with its number or `labels`; small images enlarged, not smoothed."""
    from PIL import Image, ImageDraw
    classes, each, channels, height, width = samples.shape
    scale = max(1, 40 // height)
    sheet = samples.cpu().repeat_interleave(scale, -1).repeat_interleave(scale, -2).expand(-1, -1, 3, -1, -1)
    grid = torchvision.utils.make_grid(sheet.flatten(0, 1), nrow=each, padding=2, pad_value=255)      # (3, rows, columns)
    picture = Image.new("RGB", (grid.shape[2] + 24, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (24, 0))
    for row, label in enumerate(labels or range(classes)):
        ImageDraw.Draw(picture).text((4, row * (height * scale + 2) + height * scale // 2 - 4), str(label), fill="black")
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


# -------------------------------------------------------------------------------------------------- a teacher by itself
@command_line
def train_main(argv=None):
    """python common.py --model resnet34 --dataset cifar10"""
    parser = _Parser(prog="common.py", description="Train a teacher on the real data and keep it in one file.", allow_abbrev=False)
    parser.add_argument("--model", required=True, help="model name")
    parser.add_argument("--dataset", default="cifar10", help=f"{dataset_names()} [cifar10]")
    parser.add_argument("--epochs", type=_number(int, True), help="passes over the training set [by data set]")
    parser.add_argument("--batch-size", type=_number(int, True), help="[by data set]")
    parser.add_argument("--out", help="file [checkpoints/DATASET_MODEL.pt, where the methods look for it]")
    _shared_flags(parser)
    settings = parser.parse_args(argv)
    device, arch = set_up_device(settings), check_model_name(settings.model)
    if settings.dataset not in DATASETS and not settings.dataset.startswith("folder:"):
        raise BadInput(f"unknown data set '{settings.dataset}'; choose from {dataset_names()}")
    path = Path(settings.out) if settings.out else teacher_path(settings.dataset, arch)
    if path.exists():
        raise BadInput(f"{path} is there already; name another file with --out, or move it away")
    train_teacher(arch, settings.dataset, path, settings, device, recipe_of(arch, settings.dataset, settings.epochs, settings.batch_size))
    print(f"{path}: test accuracy {_shown(read_classifier(path)['test_acc'])}")
