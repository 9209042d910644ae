"""running.py: what a method's main() needs: teachers, the command line, and the folder of a run.

    1  teachers          one file each, trained when first asked for; load_classifier gives back a network
    2  the command line  presets, a flag for every hyperparameter, one clear sentence for bad input
    3  runs and stages   log.jsonl, checkpoints, pictures, scores; exact resume

No algorithm uses this file: `distill` calls run.resume and run.log, in surrogate_kd also run.note, if it is
given a run, and works without one.

Train a teacher by itself:         python common.py --model resnet34 --dataset cifar10
Ask what a network has inside:     python common.py --inspect torchvision:swin_t
"""
import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import shutil
import sys
import textwrap
import time
import timeit
from pathlib import Path
from typing import Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision

import common
from common import (COSTS, DATASETS, BadInput, DataSpec, ImageSet, Means, accuracy, agreement, augment,
                    balanced_agreement, batchnorms, build_model, check_answers, check_model_name, cosine,
                    dataset_names, drawn_pictures, expected_calibration_error, from_function, frozen, in_bf16,
                    load_dataset, normalize, one_pass, predict, probe, sane_spec, seeded, set_lr, short,
                    some_pictures, steps, to_bytes)


# ------------------------------------------------------------------------------------------------ 1. teachers
CLASSIFIER_FORMAT = "distillation-classifier-1"
FROM_ELSEWHERE = ("; for weights from elsewhere, write a function that builds the network and loads them, "
                  "and type --teacher mine:teacher (README, Your own teacher)")
# epochs, batch size. SGD 0.1, momentum 0.9, weight decay 5e-4, cosine to 0; LeNet-5 without BN: Adam 1e-3.
# Users of the published recipe (decay 1e-4, three steps) report CIFAR-10 teachers 1 to 3 points too low.
RECIPES = {"digits": (40, 128), "mnist": (10, 256), "mnist28": (10, 256), "fashion_mnist": (20, 256),
           "fashion_mnist28": (20, 256), "svhn": (100, 128), "cifar10": (200, 128), "cifar100": (200, 128),
           "folder": (100, 128)}


def write(content, path, save=torch.save):
    """`save(content, file)` under another name, then rename: a kill leaves the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:               # torch.save has a RuntimeError for a full disk
        raise OSError(f"{path} could not be written ({short(error)})") from error
    finally:
        temporary.unlink(missing_ok=True)


def read_file(path, what):
    """The dict in a file of torch.save. Runs no code from it. Raises BadInput for damage or other content."""
    try:
        return {**torch.load(path, map_location="cpu", weights_only=True)}
    except Exception as error:
        raise BadInput(f"{path} is not a readable {what} ({type(error).__name__}): damaged, or not made by "
                       "this project" + FROM_ELSEWHERE * (what == "teacher file")) from None


def require_same(saved, wanted, path, advice):
    """Raises BadInput naming the first entry in which two dicts differ."""
    for key in [*wanted, *saved]:
        if key not in saved or key not in wanted or saved[key] != wanted[key]:
            raise BadInput(f"{path} was made with {key} = {saved.get(key)}, this command has {key} = "
                           f"{wanted.get(key)}; {advice}")


def digest(content):
    """A short text that changes when a tensor does, in a state_dict or a tuple of tensors and state_dicts."""
    if torch.is_tensor(content):
        found = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(content, (dict, tuple)):
        parts = content.items() if isinstance(content, dict) else enumerate(content)
        found = "".join(f"{key} {digest(value)} " for key, value in parts).encode()
    else:                                                      # a layer's extra state
        found = repr(content).encode()
    return hashlib.sha256(found).hexdigest()[:16]


def is_file_name(name):
    return "/" in name or (":" not in name and Path(name).suffix in (".pt", ".pth", ".ckpt", ".bin"))


def teacher_path(dataset, arch):
    """checkpoints/<dataset>_<name>.pt, where every method looks for the teacher of that name."""
    return Path("checkpoints", re.sub(r"[^\w@-]+", "_", f"{dataset}_{arch}") + ".pt")


def recipe_of(arch, dataset, epochs=None, batch_size=None):
    """How `arch` is trained on `dataset`: a dict that is kept in the teacher's file and compared on reuse."""
    if dataset.partition(":")[0].removesuffix("-val") not in RECIPES:
        raise BadInput(f"no teacher is trained on {dataset} here; name a file or torchvision:resnet50")
    usual_epochs, usual_batch = RECIPES[dataset.partition(":")[0].removesuffix("-val")]
    plain = re.fullmatch("lenet5(_half)?", arch)
    return dict(epochs=epochs or usual_epochs, batch_size=batch_size or usual_batch,
                optimizer="adam" if plain else "sgd", lr=1e-3 if plain else 0.1,
                weight_decay=0.0 if plain else 5e-4, schedule="cosine")


def train_teacher(arch, dataset, path, options, recipe):
    """Train `arch` on the real training set, always with seed 0, into `path`. Goes on after a kill.

    If another process trains the same teacher, this one waits and uses that one's file.
    """
    test, _ = load_dataset(dataset, False, options.data_dir, options.device)
    train, data = load_dataset(dataset, True, options.data_dir, options.device)
    epochs, size, lr = recipe["epochs"], recipe["batch_size"], recipe["lr"]
    identity = dict(arch=arch, dataset=dataset, threads=options.threads, precision=options.precision,
                    **recipe)
    folder = path.with_suffix(".partial")
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as lock, seeded(0):
        _lock(folder, lock, wait=True)
        if path.exists():
            shutil.rmtree(folder, ignore_errors=True)
            return
        print(f"training teacher {arch} on {dataset}: {recipe} -> {path}", flush=True)
        model = place(build_model(arch, data.num_classes, data.image_shape), options, data)
        optimizer = (torch.optim.Adam(model.parameters(), lr) if recipe["optimizer"] == "adam" else
                     torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=recipe["weight_decay"]))
        loop = Loop(folder, identity, dict(event="start", arguments=identity, versions=versions(),
                                           device=device_name(options.device)))
        loop.shown_every = max(1, epochs // 5)
        loop.load()
        for epoch in range(loop.resume(model=model, optimizer=optimizer), epochs):
            set_lr(optimizer, cosine(lr, epoch, epochs))
            means, order = Means(), one_pass(len(train.labels), size, options.device)
            model.train()
            for batch in steps(len(order), "training", order):
                images = normalize(augment(train.pixels[batch] / train.scale, data), data)
                loss = F.cross_entropy(model(images), train.labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                means.add(loss=loss)
            loop.log(epoch, means.take())
        save_classifier(path, model, arch, data, dataset, recipe=recipe, seed=0, precision=options.precision,
                        test_acc=accuracy(predict(model, test, data), test.labels),
                        seconds=loop.seconds(), device=device_name(options.device))
        shutil.rmtree(folder, ignore_errors=True)          # before a process that waits may go on
        Loop.latest = None


def save_classifier(path, model, arch, data, dataset, **more):
    """One file with all that a data-free student may know: weights, architecture, DataSpec, accuracy."""
    write(dict(format=CLASSIFIER_FORMAT, weights=model.state_dict(), arch=arch, data=data._asdict(),
               dataset=dataset, versions=versions(), **more), path)


def read_classifier(path):
    """The content of a file of `save_classifier`. Raises BadInput if there is none, or for any other file."""
    if not Path(path).is_file():
        raise BadInput(f"there is no teacher file {path}; give a file, a model name as in --teacher "
                       "resnet34, or module:function")
    content = read_file(path, "teacher file")
    try:
        content["data"] = sane_spec(DataSpec(**content["data"]))._asdict()
        sane = (content["format"] == CLASSIFIER_FORMAT and isinstance(content["dataset"], str)
                and content["weights"])
        if ":" not in content["arch"]:
            check_model_name(content["arch"])
    except (KeyError, TypeError, ValueError, AttributeError):        # of which BadInput is one
        sane = False
    if not sane:
        raise BadInput(f"{path} is not a teacher file of this project" + FROM_ELSEWHERE)
    return content


def load_classifier(path):
    """A teacher or student from its file, in eval mode on the CPU.   -> network, DataSpec

    Raises BadInput if the file is missing, damaged or not of this project, or if its weights do not fit its
    network. If the file says that the network is module:function, that function is imported and called, so
    load only files that you trust.
    """
    file = read_classifier(path)
    data = DataSpec(**file["data"])
    network = build_model(file["arch"], data.num_classes, data.image_shape)
    try:
        network.load_state_dict(file["weights"])
    except (RuntimeError, AttributeError, TypeError) as error:
        raise BadInput(f"the weights in {path} do not fit {file['arch']}: {short(error)}") from None
    return network.eval(), data


def dataset_spec(options):
    """The DataSpec that the teacher's file or function gives, else that of the data set."""
    if is_file_name(options.teacher):
        return DataSpec(**read_classifier(options.teacher)["data"])
    return getattr(options, "own_data", None) or _spec_of(options.dataset)


def _spec_of(dataset):
    return load_dataset(dataset, True)[1] if dataset.startswith("folder:") else DATASETS[dataset]


def place(network, options, data):
    """Move a network to its device and precision, and to channels_last order if it takes that.

    A network that calls x.view(len(x), -1) after a convolution does not.
    """
    network.to(options.device, memory_format=torch.channels_last)
    try:
        probe(network, [], data)
    except Exception:      # or it does not take such images at all, which check_answers will say
        network.to(memory_format=torch.contiguous_format)
    return in_bf16(network) if options.precision == "bf16" else network


def load_networks(options, settings, data, needs=lambda teacher: None, gradient=True,
                  fits=lambda student: None):
    """The networks that --teacher and --student name, on their device.   -> teacher, student

    `needs(teacher)` and `fits(student)` may refuse an architecture; they are asked before a teacher is
    trained.
    `gradient`: the method makes images by the teacher's gradient.
    """
    with seeded(settings.seed):
        student = place(build_model(options.student, data.num_classes, data.image_shape), options, data)
    for training in (False, True):
        check_answers(student, f"student {options.student}", data, training)
    fits(student)
    teacher = load_teacher(options, data, needs)
    check_answers(place(teacher, options, data), f"teacher {options.teacher}", data, gradient=gradient)
    needs(teacher)
    return teacher.eval(), student


def load_teacher(options, data, needs):
    """The network that --teacher names: a model (trained if need be), a file, or somebody else's network.

    It leaves in `options` the teacher's name for what is made from it, its architecture, and how long its
    training took.
    """
    wanted, dataset, own = options.teacher, options.dataset, getattr(options, "own_data", None)
    if ":" in wanted and not is_file_name(wanted):
        options.teacher_name, options.teacher_arch = re.sub(r"\W+", "_", wanted), wanted
        options.teacher_seconds = None
        if own and dataset != "none":
            refuse_other_data(wanted, own, dataset)
        network = getattr(options, "own_teacher", None)
        return network if network is not None else from_function(wanted, data.num_classes, True)[0]
    path = Path(wanted)
    if not is_file_name(wanted):
        path, recipe = teacher_path(dataset, wanted), recipe_of(wanted, dataset)
        if not path.exists():
            with seeded(0):
                needs(build_model(wanted, data.num_classes, data.image_shape))
            train_teacher(wanted, dataset, path, options, recipe)
        file = read_classifier(path)
        require_same({key: file.get(key) for key in ("dataset", "recipe")},
                     dict(dataset=dataset, recipe=recipe), path,
                     f"to use that file as it is, type --teacher {path}; to train anew, move it away")
    file, (teacher, of_file) = read_classifier(path), load_classifier(path)
    if dataset != "none":
        refuse_other_data(wanted, of_file, dataset)
    options.teacher_name, options.teacher_arch = path.stem, file["arch"]
    options.teacher_seconds = file.get("seconds")
    return teacher


def refuse_other_data(teacher, data, dataset):
    """Raises BadInput if a teacher's own DataSpec has other classes or another shape than the data set."""
    asked = _spec_of(dataset)
    for what, here, there in (("classes", data.num_classes, asked.num_classes),
                              ("image shape", tuple(data.image_shape), tuple(asked.image_shape))):
        if here != there:
            raise BadInput(f"teacher {teacher} is for {what} {here}, data set '{dataset}' has {there}; "
                           "name the data set that the teacher was trained on with --dataset")


def inspect_network(name):
    """What a network has that a method may need, in the words of the front page's table.   -> lines of text

    `name`: as --teacher takes it. What the network has is found by running it on blank images. Raises
    BadInput for a network that cannot be built or answers no image.
    """
    classes, sides, data = 10, (8, 28, 32, 64, 224), None
    shapes = [(channels, side, side) for channels in (1, 3) for side in sides]
    if is_file_name(name):
        model, data = load_classifier(name)
    elif ":" in name:
        model, data = from_function(name, 1000)                              # as many as torchvision's have
    else:
        model = build_model(name, classes, (1 if name.startswith("lenet5") else 3, 32, 32))
    if data:
        classes, shapes = data.num_classes, [tuple(data.image_shape)]
        check_answers(model, name, data)
    taken = []
    for shape in shapes:
        with contextlib.suppress(Exception), torch.no_grad(), frozen(model):
            answer = model(torch.zeros(2, *shape))                           # which may raise anything
            if answer.dim() == len(answer) == 2:
                taken, classes = [*taken, shape], answer.shape[1]
    if not taken:
        raise BadInput(f"{name} answers no blank images of {', '.join(map(str, shapes))} with logits (N, K); "
                       "if it takes others, let the function return network, DataSpec(...)")
    data = data or DataSpec(taken[-1], classes, (0.5,) * taken[-1][0], (0.5,) * taken[-1][0])
    names = {layer: key for key, layer in model.named_modules()}
    seen = probe(model, [layer for layer in names if not list(layer.children())], data)   # as they ran
    vectors = [layer for layer, x in seen.items() if isinstance(layer, nn.Linear) and x.dim() == 2]
    maps = [layer for layer, x in seen.items()
            if x.dim() == 4 and x.shape[2] > 1 and tuple(x.shape[1:]) != tuple(data.image_shape)]
    last_map = getattr(model, "last_map", None) or [None, *maps][-1]

    def input_of(layer):
        return f"input of {names[layer]}, (N, {', '.join(map(str, seen[layer].shape[1:]))})"
    norms, (_, height, width) = len(batchnorms(model, data)), data.image_shape
    made = height % 4 == width % 4 == 0          # what the papers' generators can make; each refuses others
    can = dict(plain_inversion=True, csd=made and height == width, rdskd=made, dafl=made and bool(vectors),
               cudfkd=made and (min(height, width) < 64 or height % 8 == width % 8 == 0),
               deepinversion=bool(norms))
    makers = [method for method, possible in can.items() if possible]
    known = hasattr(model, "last_map") or not last_map
    return [
        f"{name}: {sum(weight.numel() for weight in model.parameters()):,} weights, {classes} classes",
        f"images            {', '.join('x'.join(map(str, shape)) for shape in taken)}"
        + ("" if len(shapes) == 1 else ", of those tried"),
        f"BatchNorm         {f'{norms} layers' if norms else 'none'}",
        f"a linear layer    {input_of(vectors[-1]) if vectors else 'none'}",
        f"last feature map  {input_of(last_map) if last_map else 'none'}"
        + ("" if known else f", a guess; if it is right: csd.py --teacher-last-map {names[last_map]}"),
        f"data-free methods that can use it: {', '.join(makers)}"
        + ("" if vectors else "; not dafl, which needs a linear layer")
        + ("" if norms else "; not deepinversion, which needs BatchNorm"),
        "with pictures of other things: surrogate_kd" + (
            "" if norms else ". Without BatchNorm, the images of plain_inversion, csd and cudfkd are less "
                             "like the data; the front page says what helps")]


def compare_students(teacher, students, pictures):
    """How often students name the same class as their teacher in pictures of anything.

    `teacher` as --teacher takes it; `students`: their files or run folders; `pictures`: folder:PATH, of which
    at most 1,000 are looked at, or 200 of more than 64x64 pixels, always the same ones. No label is needed.
    -> lines of text, the highest balanced agreement first. Raises BadInput for a file or folder that cannot
    be used, for a student of another teacher, and for one that was taught with another DataSpec.
    """
    if not pictures.startswith("folder:"):
        raise BadInput(f"--pictures {pictures} is no folder; type --pictures folder:{pictures}")
    files = [Path(name, "student.pt") if Path(name).is_dir() else Path(name) for name in students]
    for file in files:
        if not file.is_file():
            raise BadInput(f"there is no student {file}; name the folder of a run that has ended")
    found = [read_classifier(file) for file in files]
    data, own = DataSpec(**found[0]["data"]), found[0]["dataset"]
    if ":" in teacher and not is_file_name(teacher):
        network, spec = from_function(teacher, data.num_classes, pretrained=True)
    else:
        network, spec = load_classifier(teacher if is_file_name(teacher) else teacher_path(own, teacher))
    for file, content in zip(files, found):
        if content.get("teacher_sha256") != digest(network.state_dict()):
            raise BadInput(f"{file} is no student of {teacher}; compare students of one teacher")
        if DataSpec(**content["data"]) != (spec or data):
            raise BadInput(f"{file} was taught with another DataSpec than that of {teacher} or {files[0]}; "
                           "compare students of one teacher and one DataSpec")
    with seeded(0):
        images = some_pictures(pictures, 1000 if max(data.image_shape[1:]) <= 64 else 200, data)
    images = ImageSet(images, None, 1)
    answers = predict(network, images, data)
    scores = {}
    for file in files:
        logits = predict(load_classifier(file)[0], images, data)
        scores[file] = agreement(logits, answers), balanced_agreement(logits, answers)
    return [f"agreement with {teacher} on {len(answers)} pictures of {pictures}, as it is and balanced",
            *("{:.4f}  {:.4f}  {}".format(*scores[file], file)
              for file in sorted(files, key=lambda file: scores[file][::-1], reverse=True))]


# ---------------------------------------------------------------------------------------- 2. the command line
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise BadInput(message + "; --help lists the flags")


def number_type(kind, above_0, below=10 ** 9):
    """An argparse type: an int or float, above 0 or at least 0, and under `below`."""
    def convert(text):
        value = kind(text)
        if not 0 <= value < below or (above_0 and value == 0):               # NaN is refused, too
            least = "above" if above_0 else "at least"
            raise argparse.ArgumentTypeError(f"must be {least} 0 and under {below}, not {text[:40]}")
        return value
    convert.__name__ = "whole number" if kind is int else "number"       # argparse: invalid number value: 'x'
    return convert


def shared_flags(parser):
    add = parser.add_argument
    add("--data-dir", default="data", help="where the data sets are, or are downloaded to [data]")
    add("--device", help="cpu, cuda or cuda:N [cuda if there is one]")
    add("--precision", choices=["fp32", "tf32", "bf16"], help="of forward passes [tf32 on CUDA, else fp32]")
    add("--deterministic", action="store_true", help="bit-equal runs on CUDA too, slower")
    add("--threads", type=number_type(int, True, 1025), help="CPU threads [as PyTorch chooses]")


def parse(method, doc, Settings, presets, argv=None, fits=lambda settings, flags: True, **own):
    """The command line of a method: a preset's Settings, changed by flags.

    Every field of Settings is a flag, and its trailing comment is the help text. A whole number may be 0
    where the comment explains "0 = "; a rate or a temperature may not. `presets`: {name: Preset}.
    `fits(settings, flags)` says whether a preset may be taken when none is named. `own`: {name: help} of
    flags that are no hyperparameters, or (help, type) if the flag is not a text.
    -> the run's options, the method's Settings. Raises BadInput.
    """
    parser = Parser(prog=f"{method}.py", description=doc.strip().splitlines()[0], allow_abbrev=False,
                    epilog="benchmarks/costs.py counts FLOPs, queries and memory of a run before it starts")
    add = parser.add_argument
    add("--teacher", help="model name (trained if need be), file, torchvision:NAME, module:function")
    add("--student", help="model name, torchvision:NAME or module:function")
    add("--dataset", help=f"{dataset_names()} [cifar10]")
    add("--preset", help=f"{', '.join(presets)} [the first that fits data set and networks]")
    add("--out", help=f"run folder [the next free runs/{method}-DATASET-001]")
    add("--resume", action="store_true", help="go on with the run in --out; repeat its other flags")
    add("--eval-every", type=number_type(int, True), default=1, help="epochs between scores [1]")
    add("--keep-epochs", action="store_true", help="keep the student of each epoch, for benchmarks/epochs.py")
    shared_flags(parser)
    kinds = {str: dict(default=""), bool: dict(action="store_true"),
             int: dict(type=number_type(int, False), default=0)}
    for name, text in own.items():
        text, kind = text if isinstance(text, tuple) else (text, str)
        add("--" + name.replace("_", "-"), help=text, **kinds[kind])
    said = dict(re.findall(r"^    (\w+):.*?# (.*)$", inspect.getsource(Settings), re.M))    # fields' comments
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name, field in fields.items():
        values = {key: getattr(preset.settings, name) for key, preset in presets.items()}
        shown, text = next(iter(values.values())), said.get(name, "")
        if len(set(values.values())) > 1:
            shown = ", ".join(f"{key} {value}" for key, value in values.items())
        above_0 = name.startswith("lr_") or name == "temperature"
        if field.type is int and name != "seed":
            above_0 = "0 = " not in text
        how = (dict(action=argparse.BooleanOptionalAction) if field.type is bool else
               dict(choices=get_args(field.type)) if get_origin(field.type) is Literal else
               dict(type=str) if field.type is str else
               dict(type=number_type(field.type, above_0, 2 ** 32 if name == "seed" else 10 ** 9)))
        text = f"{text} [{shown}]".replace("%", "%%")
        add("--" + name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)
    given = vars(parser.parse_args(argv))
    flags = {name: given.pop(name) for name in fields if name in given}
    options = argparse.Namespace(method=method, **given)
    settings = choose_preset(options, presets, flags, fits)
    options.changed = {key: value for key, value in flags.items()
                       if value != getattr(settings, key) and key != "seed"}
    settings = dataclasses.replace(settings, **flags)
    set_up_device(options)
    _check_folder(options, settings)
    for name, text in own.items():
        path = getattr(options, name)
        # it is to be made; a file, from an older version, is refused later, with advice
        if isinstance(text, str) and path and not (Path(path).is_file() or Path(path, "result.pt").exists()):
            _check_writable(path, f"the folder of --{name}")
    return options, settings


def choose_preset(options, presets, flags, fits):
    """Fill in preset, data set and networks, where they were not given.   -> the preset's Settings

    Without --preset, the first one is taken that has every one of data set, teacher and student that was
    given; else the data set's first preset, with the given networks in it. A teacher's file counts as the
    network and the data set that it says it is, also beside a --preset for another one. Where no data set is
    known, only what its images look like, the first preset for CIFAR-10 is taken for colour images, and the
    first one for MNIST for grey ones.
    """
    if options.preset and options.preset not in presets:
        raise BadInput(f"{options.method} has no preset '{options.preset}'; choose from {', '.join(presets)}")
    file, own = {}, None
    if options.teacher and is_file_name(options.teacher):
        file = read_classifier(options.teacher)
        own = DataSpec(**file["data"])
    elif options.teacher and ":" in options.teacher and not options.teacher.startswith("torchvision:"):
        options.own_teacher, own = from_function(options.teacher)
        options.own_data = own
        if not own and not options.dataset and not options.preset:
            raise BadInput(f"{options.teacher} does not say what its images look like, and no --dataset is "
                           "named; let it end with: from common import DataSpec; data = DataSpec(image_shape="
                           "(3, 32, 32), num_classes=10, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)); "
                           "return network, data")
    of_file, usual = file.get("dataset"), presets[options.preset].dataset if options.preset else "cifar10"
    # With --preset cifar10-cpu, a teacher of cifar10-val has its students scored on cifar10's test images.
    if of_file and (not options.preset or of_file.removesuffix("-val") != usual):
        usual = of_file
    options.dataset = name = options.dataset or ("none" if own and not file else usual)
    if name not in (*DATASETS, "none") and not name.startswith("folder:"):
        raise BadInput(f"unknown data set '{name}'; choose from {dataset_names()}")
    if name == "none" and not own:
        raise BadInput("--dataset none needs a --teacher file, or a module:function that returns a network "
                       "and its DataSpec")
    if not options.preset:
        guessed = None
        known = (file.get("dataset", "none") if name == "none" else name).removesuffix("-val")
        sets = [preset.dataset for preset in presets.values()]
        if known not in sets and name == "none":
            grey = own.image_shape[0] == 1
            known = "mnist" if grey and "mnist" in sets else "cifar10"
            guessed = "grey" if grey else "colour"
        of_set = [key for key, preset in presets.items()
                  if preset.dataset == known and fits(preset.settings, flags)]
        wanted = file.get("arch", options.teacher), options.student
        exact = [key for key in of_set if all(want in (None, has) for want, has in zip(
            wanted, (presets[key].teacher, presets[key].student)))]
        if not of_set:
            raise BadInput(f"{options.method} has no preset for data set '{known}'; take another's numbers "
                           f"with --preset: {', '.join(presets)}")
        options.preset = [*exact, *of_set][0]
        if guessed:
            print(f"no data set is named; for {guessed} images the preset is {options.preset}", flush=True)
    preset = presets[options.preset]
    options.teacher, options.student = options.teacher or preset.teacher, options.student or preset.student
    for network in [options.student] if file else [options.teacher, options.student]:
        if ":" not in network:
            check_model_name(network)
    return preset.settings


def set_up_device(options):
    """Fill in device, precision and threads, and set PyTorch's global switches. Raises BadInput."""
    wanted = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise BadInput(f"unknown device '{wanted}'; choose cpu, cuda or cuda:N")
    if wanted != "cpu" and int(wanted.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise BadInput(f"there is no device '{wanted}' here ({torch.cuda.device_count()} CUDA devices); type "
                       "--device cpu")
    options.device = torch.device(wanted)
    options.precision = options.precision or ("fp32" if wanted == "cpu" else "tf32")
    if wanted == "cpu" and options.precision == "tf32":
        raise BadInput("tf32 is for CUDA; leave it out on a CPU")
    if wanted != "cpu":
        torch.cuda.set_device(int(wanted.partition(":")[2] or 0))
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads = torch.get_num_threads()
    if wanted == "cpu" and options.precision == "bf16" and (factor := bf16_slowdown()) > 1.1:
        print(f"note: on this processor a convolution in bf16 takes {factor:.1f} times as long as in fp32; "
              "leave out --precision bf16", flush=True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = options.precision != "fp32"
    torch.backends.cudnn.benchmark = not options.deterministic    # shapes are static: compare algorithms once
    if options.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(options.deterministic)


def bf16_slowdown():
    """A 3x3 convolution's time in bf16 over its time in fp32, on this CPU: under 1 where bf16 pays."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        images, weights = (torch.ones(shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
                           for shape in ((16, 64, 16, 16), (64, 64, 3, 3)))
        found.append(min(timeit.repeat(lambda: F.conv2d(images, weights, padding=1), number=1, repeat=9)))
    return found[1] / found[0]


def _check_folder(options, settings):
    """Raises BadInput if the run folder cannot be used; makes nothing."""
    out = options.out
    if options.resume and not out:
        raise BadInput("--resume needs --out FOLDER, the folder of the run to go on with")
    try:
        holds = out and any(Path(out, name).exists() for name in RUN_FILES)
    except OSError as error:
        raise BadInput(f"--out cannot be a run folder: {error.strerror}") from None
    if holds and not options.resume:
        raise BadInput(f"{out} holds a run already; name another folder, or go on with it by --resume")
    if out and Path(out, "log.jsonl").is_file():
        rows = []
        for line in Path(out, "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):          # a row that a kill has cut off
                rows.append(json.loads(line))
        rows = [row for row in rows if isinstance(row, dict)]
        # one epoch may be in the log before its checkpoint is; two cannot. A stage's folder is no run's.
        lost = not Path(out, "checkpoint.pt").exists() and (
            any("stage" in row for row in rows) or sum(row.get("event") == "epoch" for row in rows) > 1)
        if lost and rows[-1].get("event") != "end":
            raise BadInput(f"{out} has a log and no checkpoint.pt to go on from; name another folder")
        if rows and rows[-1].get("event") == "end":
            raise BadInput(f"the run in {out} is finished; its result is the last line of its log.jsonl. For "
                           "a longer one, name another --out")
    _check_writable(out or "runs", "a run folder")


def _check_writable(path, what):
    """Raises BadInput if the folder cannot be made, or not be written to; makes nothing."""
    folder = Path(path).absolute()
    try:
        while not folder.exists():
            folder = folder.parent
    except OSError as error:
        raise BadInput(f"{path} cannot be {what}: {error.strerror}") from None
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise BadInput(f"{path} cannot be {what}: {folder} is {'read-only' if folder.is_dir() else 'a file'}")


def versions():
    return {"python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": str(torchvision.__version__)}


def device_name(device):
    """'NVIDIA H200', or 'AMD EPYC AVX512, 2 threads': a CPU, its instructions if beyond AVX2, threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        name = platform.processor() or platform.machine()
    instructions = torch.backends.cpu.get_cpu_capability()
    name += f" {instructions}" * (instructions not in ("DEFAULT", "AVX2"))
    return f"{name}, {torch.get_num_threads()} threads"


# ------------------------------------------------------------------------ 3. runs, stages and what they leave
class Loop:
    """A long loop in a folder of its own: log.jsonl, samples.png, and checkpoint.pt while it goes on.

    The loop calls `resume` once and `log` at the end of each epoch (or round). The checkpoint holds the state
    as it was then, random streams included, and the length of the log: a loop that goes on after a kill cuts
    its log back to that length. `identity` is a dict of all that the state depends on; a checkpoint with
    another one is refused by the name of the first difference. `first` is the log's first row.
    """
    counter = "epoch"
    shown_every = 1    # epochs for a line on the screen
    latest = None      # the loop that was saved or resumed last, for messages

    def __init__(self, folder, identity, first=None, num_classes=0):
        self.path, self.identity = Path(folder, "checkpoint.pt"), {"format": 3, **identity}
        self.first, self.num_classes, self.rows, self.columns = first, num_classes, [], None
        self.started, self.saved, self.start, self.next = False, None, 0, 0
        self.began, self.before = time.monotonic(), 0.0

    folder = property(lambda self: self.path.parent)

    def log_bytes(self):
        log = self.folder / "log.jsonl"
        return log.stat().st_size if log.exists() else 0

    def load(self):
        """Read the checkpoint, if there is one, and refuse it now if it does not fit."""
        if self.path.exists() and self.saved is None:
            saved = read_file(self.path, "checkpoint")
            if not {"identity", "state", "epoch", "log_bytes", "seconds", "rng", "cuda_rng",
                    "costs"} <= {*saved}:
                raise BadInput(f"{self.path} is not a checkpoint of this version of the program; start anew "
                               "elsewhere")
            require_same(saved["identity"], {**saved["identity"], **self.identity}, self.path,
                         "type the settings of then, or start anew elsewhere, or move it away")
            if saved["log_bytes"] > self.log_bytes():
                raise BadInput(f"the log beside {self.path} is shorter than it was when that was saved; put "
                               "it back, or start anew elsewhere")
            self.saved = saved

    def begin(self):
        """Make the folder and start its log, or go on with the log that is there."""
        self.started = True
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.tmp"):              # of a process that was killed while it wrote
            leftover.unlink()
        if self.saved is None:
            (self.folder / "log.jsonl").unlink(missing_ok=True)    # of one that was killed before it saved
            self.write(self.first)

    def write(self, row):
        """Add a row to the log and a line to the screen."""
        if not self.started:
            self.begin()
        if self.saved is None:              # else this is a loop that goes on: its log has the row already
            self.rows.append(row)
            with open(self.folder / "log.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
        if "text" in row:
            print(f"{row['event']}: {row['text']}", flush=True)
        elif row["event"] == self.counter and (row[self.counter] + 1) % self.shown_every == 0:
            self._print(row)

    def note(self, text, event="note", **more):
        self.write(dict(event=event, text=text, **more))

    def resume(self, **state):
        """Fill modules, optimizers and tensors in place from the checkpoint, if there is one.

        -> the first epoch or round to do
        """
        if not self.started:
            self.begin()
        self.state, saved, Loop.latest = state, self.saved, self
        if saved is None:
            return 0
        require_same(saved["identity"], self.identity, self.path, "put it back as it was, or start anew")
        if set(saved["state"]) != set(state):
            raise BadInput(f"{self.path} holds the state of another version of this program; start anew")
        for name, value in state.items():
            try:
                (value.copy_ if torch.is_tensor(value) else value.load_state_dict)(saved["state"][name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise BadInput(f"{self.path} does not fit this {name} ({short(error)}); was the function "
                               "that builds it changed? Put it back, or start anew elsewhere") from None
        torch.set_rng_state(saved["rng"])
        if torch.cuda.is_initialized() and len(saved["cuda_rng"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])
        COSTS.clear()
        COSTS.update(saved["costs"])
        self.before, self.began, self.saved = saved["seconds"], time.monotonic(), None
        log, self.start = self.folder / "log.jsonl", saved["epoch"] + 1
        self.next = self.start
        os.truncate(log, saved["log_bytes"])
        self.rows[:] = [json.loads(line) for line in log.read_text().splitlines()]
        self.write({**self.first, "event": "resume"})
        for what in ("versions", "device"):
            if self.rows[0][what] != self.first[what]:
                self.note(f"resumed with {what} {self.first[what]}, begun with {self.rows[0][what]}: the end "
                          "may differ by rounding")
        return self.next

    def log(self, number, means, pixels=None, labels=None):
        """An epoch or a round is over: write a row and a line, draw its images, keep the state.

        `means`: {name: number}. `pixels` (N, C, H, W) in [0, 1] and `labels` (N,): images to be shown.
        """
        *warnings, row = describe(self.counter, number, means, pixels, labels, self.num_classes)
        self.score(number, row)
        for each in (*warnings, row):
            self.write(each)
        if pixels is not None:
            save_samples(self.folder / "samples.png", pixels, labels, self.num_classes)
        self.save(number)

    def score(self, number, row):
        """A run adds its student's scores to the row."""

    def save(self, number):
        state = {name: value if torch.is_tensor(value) else value.state_dict()
                 for name, value in self.state.items()}
        write(dict(identity=self.identity, state=state, epoch=number, log_bytes=self.log_bytes(),
                   seconds=self.seconds(), rng=torch.get_rng_state(), costs=dict(COSTS),
                   cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []), self.path)
        Loop.latest, self.next = self, number + 1

    def seconds(self):
        """Since the loop began, without the pauses in which it did not run."""
        return self.before + time.monotonic() - self.began

    def cost(self):
        return dict(seconds=round(self.seconds(), 1), peak_memory_mb=peak_memory_mb(),
                    teacher_queries=COSTS["teacher_queries"])

    def _print(self, row):
        """One aligned line; names when they change. Lists, counters and terms that are 0 are left out."""
        shown = {key.removeprefix("loss_"): value for key, value in row.items() if key != "teacher_queries"
                 and not key.startswith("seconds_") and not isinstance(value, (list, str))}
        shown["seconds"] = round(sum(value for key, value in row.items() if key.startswith("seconds_")), 1)
        if not self.columns or shown.keys() != self.columns[0]:
            self.columns = shown.keys(), [key for key in shown if shown[key] != 0 or f"loss_{key}" not in row]
            print(" ".join(f"{key:>{max(8, len(key))}s}" for key in self.columns[1]))
        print(" ".join(f"{_shown(shown[key]):>{max(8, len(key))}s}" for key in self.columns[1]), flush=True)


class Stage(Loop):
    """What is made once for all students of a teacher, as CSD's bank: a loop of rounds, and result.pt."""
    counter = "round"

    def __init__(self, folder, kind, made_with, run):
        arguments = {**made_with, "threads": run.options.threads}
        first = dict(event="start", method=run.options.method, stage=kind, arguments=arguments,
                     versions=versions(), device=device_name(run.options.device))
        super().__init__(folder, arguments, first, run.data.num_classes)
        self.made_with, self.run = made_with, run

    def make(self, make):
        """Keep what `make(self)` returns, with what it was made with and what it cost, in result.pt."""
        self.began = time.monotonic()
        COSTS.clear()
        result = make(self)
        cost = self.cost()
        self.write(dict(event="end", **cost))
        write(dict(made_with=self.made_with, result=result, seconds=cost["seconds"],
                   teacher_queries=cost["teacher_queries"]), self.folder / "result.pt")
        self.path.unlink(missing_ok=True)


class Run(Loop):
    """The run of a student: log.jsonl, samples.png, curves.png, checkpoint.pt, student.pt in one folder.

    Only the run sees the test set. `distill` calls `resume` once and `log` at the end of each epoch, and may
    call `note`; main() may call `reuse`, `note` and `finish`. The folder is made with the first row of the
    log, when everything that can be refused was accepted.
    """
    def __init__(self, options, settings, teacher, student, data, scored=True):
        self.options, self.settings, self.student, self.data = options, settings, student, data
        self.test = self.drawn = None
        if scored and options.dataset not in ("none", "imagenet"):
            self.test, _ = load_dataset(options.dataset, False, options.data_dir, options.device)
        if scored:
            drawn = drawn_pictures(data)
            self.drawn = drawn._replace(pixels=drawn.pixels.to(options.device))
        self.score_teacher(teacher)
        teacher.register_forward_pre_hook(      # counts the images that the teacher is asked about
            lambda module, inputs: COSTS.update(teacher_queries=0 if common._scoring else len(inputs[0])))
        same = ("method", "dataset", "student", "precision", "deterministic", "threads", "eval_every")
        super().__init__(options.out or "runs", dict(
            {key: getattr(options, key) for key in same}, teacher=digest(teacher.state_dict()),
            **dataclasses.asdict(settings)), num_classes=data.num_classes)
        if options.resume:
            self.load()
        COSTS.clear()

    def score_teacher(self, teacher):
        """Keep what the teacher says of the test images and of the drawn pictures; these are no queries."""
        self.teacher_logits = predict(teacher, self.test, self.data) if self.test else None
        self.teacher_acc = accuracy(self.teacher_logits, self.test.labels) if self.test else None
        self.teacher_drawn = predict(teacher, self.drawn, self.data) if self.drawn else None

    def doubt_teacher(self):
        """A sentence for a teacher that seems to know nothing, or None."""
        guess = 1 / self.data.num_classes
        if self.test:
            spread = math.sqrt(guess * (1 - guess) / len(self.test.labels))
            if self.teacher_acc <= guess + 2 * spread:
                return (f"the teacher has {100 * self.teacher_acc:.1f} % of the test images right, which is "
                        "no better than a guess; were its weights loaded, and are mean and std right?")
        elif self.drawn and len(self.teacher_drawn.argmax(1).unique()) == 1:
            return (f"the teacher sees class {int(self.teacher_drawn[0].argmax())} in all drawn pictures; "
                    "were its weights loaded, and are mean and std right?")
        return None

    def begin(self):
        """Choose and lock the folder; print what holds."""
        options = self.options
        hidden = ("method", "changed", "resume", "teacher_name", "teacher_arch", "teacher_seconds",
                  "own_teacher", "own_data")
        self.path = _make_folder(options) / "checkpoint.pt"
        _lock(self.folder, _locks)
        if not options.resume and any((self.folder / name).exists() for name in RUN_FILES):
            raise BadInput(f"another process has used {self.folder} meanwhile; name another --out")
        if options.resume:                  # it may have gone on with this run, too, while this one waited
            _check_folder(options, self.settings)
            self.saved = None
            self.load()
        arguments = {key: value for key, value in vars(options).items() if key not in hidden}
        arguments.update(dataclasses.asdict(self.settings), device=str(options.device))
        self.first = dict(
            event="start", method=options.method, arguments=arguments, changed=options.changed,
            versions=versions(), device=device_name(options.device), teacher_sha256=self.identity["teacher"],
            teacher_acc=self.teacher_acc, teacher_seconds=options.teacher_seconds,
            data=self.data._asdict(), drawn_pictures=len(self.drawn.pixels) if self.drawn else 0)
        shown = " ".join(f"{key}={arguments[key]}" for key in sorted(arguments)
                         if arguments[key] not in ("", None))
        print(textwrap.fill(shown, 110, initial_indent=f"{options.method}: ", subsequent_indent="    "))
        print(f"teacher {options.teacher}: test accuracy {_shown(self.teacher_acc)}; student "
              f"{options.student}; {self.first['device']}; {self.folder}", flush=True)
        super().begin()
        doubt = self.doubt_teacher()
        if doubt:
            self.note(doubt, "warning")

    def reuse(self, kind, folder, shaped_by, make, **more):
        """What `make(stage)` returned when it was called once: tensors, kept in `folder` for other students.

        `kind`: bank, pool, ...; also the flag that names another folder. `shaped_by`: the settings that
        shape the result. `more`: what else it depends on. A result or a half-made one of other settings is
        refused by the name of the first difference. Its seconds and teacher queries count as this run's.
        """
        folder = Path(folder)
        made_with = dict(format=f"{self.options.method}-{kind}-6", teacher=self.identity["teacher"],
                         precision=self.options.precision, **self.data._asdict(), **more,
                         **{name: getattr(self.settings, name) for name in shaped_by})
        if folder.is_file():
            raise BadInput(f"{folder} is a file; --{kind} names a folder, in which the {kind} is kept")
        own = self.options.out and folder.resolve() == Path(self.options.out).resolve()
        if own or (folder / "student.pt").exists():
            raise BadInput(f"{folder} is the folder of a run; --{kind} needs another one")
        result = folder / "result.pt"
        if not result.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as lock:
                _lock(folder, lock, wait=True)
                stage = Stage(folder, kind, made_with, self)
                if not result.exists():                    # else another process has made it meanwhile
                    stage.load()
                    if not self.started:
                        self.begin()
                    print(f"{kind} -> {folder}", flush=True)
                    stage.make(make)
        else:
            print(f"{kind} from {folder}", flush=True)
        kept = read_file(result, kind)
        require_same(kept.get("made_with", {}), made_with, result,
                     f"name another folder with --{kind}, or move this one away")
        cost = {name: kept[name] for name in ("seconds", "teacher_queries")}
        self.identity[kind] = digest(kept["result"])
        self.write(dict(event=kind, path=str(folder), sha256=self.identity[kind], **cost))
        COSTS.clear()
        COSTS["teacher_queries"] = cost["teacher_queries"]
        self.before, self.began = self.before + cost["seconds"], time.monotonic()
        return kept["result"]

    def score(self, epoch, row):
        row.update(student_acc=None, agreement=None, agreement_drawn=None, balanced_drawn=None)
        if epoch != self.settings.epochs - 1 and (epoch + 1) % self.options.eval_every:
            return
        if self.test:
            logits = predict(self.student, self.test, self.data)
            row["student_acc"] = accuracy(logits, self.test.labels)
            row["agreement"] = agreement(logits, self.teacher_logits)
        if self.drawn:
            logits = predict(self.student, self.drawn, self.data)
            row["agreement_drawn"] = agreement(logits, self.teacher_drawn)
            row["balanced_drawn"] = balanced_agreement(logits, self.teacher_drawn)

    def log(self, epoch, means, pixels=None, labels=None):
        """An epoch is over: score the student, write a row and a line, draw the images, keep the state."""
        self.pixels = pixels
        super().log(epoch, means, pixels, labels)
        left = (self.settings.epochs - 1 - epoch) * (time.monotonic() - self.began)
        if epoch == self.start and left > 60 and self.drawn:
            print(f"at this speed the other epochs take {left / 60:.0f} minutes", flush=True)

    def save(self, epoch):
        if self.options.keep_epochs:       # before the checkpoint, so that a kill in between loses no epoch
            shown = None if self.pixels is None else (255 * self.pixels[:200].clamp(0, 1)).byte().contiguous()
            write(dict(student=self.student.state_dict(), pixels=shown), self.folder / f"epochs/{epoch}.pt")
        super().save(epoch)

    def finish(self, result=None):
        """Write curves.png, student.pt and the end row, and print the result of the last epoch.

        In this order: a run that is killed in between ends the same when it is resumed. `result`: a line
        for the screen, of a run that trained no student.
        """
        cost = self.cost()
        if result:
            self.write(dict(event="end", teacher_acc=self.teacher_acc, **cost))
            print(f"{result}, {cost['seconds']:.0f} s", flush=True)
            return
        epochs = [row for row in self.rows if row["event"] == "epoch"]
        scores = [row["student_acc"] for row in epochs if row["student_acc"] is not None]
        last, best, ece = epochs[-1]["student_acc"], max(scores, default=None), None
        if self.test:
            ece = expected_calibration_error(predict(self.student, self.test, self.data), self.test.labels)
        row = dict(event="end", teacher_acc=self.teacher_acc, student_acc_last=last, student_acc_best=best,
                   agreement=epochs[-1]["agreement"], agreement_drawn=epochs[-1]["agreement_drawn"],
                   balanced_drawn=epochs[-1]["balanced_drawn"], ece=ece, **cost)
        save_curves(self.folder / "curves.png", epochs, self.teacher_acc)
        save_classifier(self.folder / "student.pt", self.student, self.options.student, self.data,
                        self.options.dataset, test_acc=last, method=self.options.method,
                        teacher_sha256=self.identity["teacher"])
        self.write(row)
        drawn = (f"{_shown(row['agreement_drawn'])} on drawn pictures (balanced "
                 f"{_shown(row['balanced_drawn'])})")
        if getattr(self.settings, "surrogate", "") == "leaves":
            drawn += ", which are of the kind that it was trained on"
        if self.test:
            print(f"last epoch: student {_shown(last)}, teacher {_shown(self.teacher_acc)} on the test "
                  f"images\n"
                  f"agreement with the teacher: {_shown(row['agreement'])} on the test images, {drawn}\n"
                  f"[best epoch, chosen on the test set: {_shown(best)}; calibration error {_shown(ece)}; "
                  f"{row['seconds']:.0f} s]")
        else:
            print(f"last epoch: agreement with the teacher {drawn}\n"
                  f"[there are no test images, so the accuracy is not known; {row['seconds']:.0f} s]")
        there = [name for name in RUN_FILES if Path(self.folder, name).exists() and name != "checkpoint.pt"]
        print(f"{self.folder}: {', '.join(there)}", flush=True)


RUN_FILES = "student.pt", "samples.png", "curves.png", "log.jsonl", "images.pt", "checkpoint.pt"


def describe(counter, number, means, pixels, labels, num_classes):
    """The rows of an epoch or a round: its means, after a warning if its images (pixels in [0, 1]) collapsed.

    There are three signs of a collapse: the images hardly differ (by 2 or 3 of 255 grey levels); all are in
    one class; the entropy of their classes is under half of what it can be.
    """
    row, found = {"event": counter, counter: number, **means}, []
    if pixels is not None:
        row["pixel_std"] = pixels.std(0, correction=0).mean().item()
        if row["pixel_std"] < 0.01:
            found.append("its images hardly differ")
    if labels is not None:
        counts = torch.bincount(labels, minlength=num_classes)
        share = counts.double() / counts.sum()
        entropy = -torch.xlogy(share, share).sum().item() / math.log(max(2, min(num_classes, len(labels))))
        row["class_counts"] = counts.tolist() if num_classes <= 100 else None
        if entropy < 0.5:
            found.append(f"all its images are in class {counts.argmax()}" if counts.max() == len(labels) else
                         f"the entropy of its classes is {entropy:.2f} of the largest")
    seconds = {key: round(COSTS.pop(key), 3) for key in list(COSTS) if key.startswith("seconds_")}
    row.update(seconds, teacher_queries=COSTS["teacher_queries"])
    warning = {"event": "collapse", counter: number, "text": f"{counter} {number}: {', '.join(found)}"}
    return [warning, row] if found else [row]


def _make_folder(options):
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
        return Path(options.out)
    name = options.dataset.partition(":")[0]
    if name == "none":                  # named after the teacher: mine of mine:teacher
        name = Path(options.teacher.partition(":")[0]).stem
    for number in itertools.count(1):   # mkdir, not exists: two runs started together must not get one folder
        folder = Path("runs", f"{options.method}-{name}-{number:03d}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder


def _shown(value):
    """For the screen: '-' for None, four digits after the point, fewer for large numbers."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 100 else f"{value:.1f}"
    return "-" if value is None else str(value)


def peak_memory_mb():
    """Most memory held so far: on CUDA by PyTorch's tensors, else by the process."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2 ** 20)
    try:
        import resource
    except ImportError:        # Windows
        return None
    unit = 2 ** 20 if sys.platform == "darwin" else 2 ** 10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def save_samples(path, pixels, labels, num_classes, each=8, most=20):
    """The last `each` of pixels (N, C, H, W) in [0, 1] of each class, a PNG row a class, at most `most`."""
    from PIL import Image, ImageDraw
    pixels, labels = to_bytes(pixels).cpu(), labels.cpu()
    classes = list(range(num_classes)) if num_classes <= most else labels.unique().tolist()[:most]
    sheet = pixels.new_zeros(len(classes), each, *pixels.shape[1:])          # black where a class has fewer
    for row, label in enumerate(classes):
        found = pixels[labels == label][-each:]
        sheet[row, :len(found)] = found
    scale = max(1, 40 // pixels.shape[2])                                # small images enlarged, not smoothed
    if pixels.shape[1] not in (1, 3):                                    # shown in grey
        sheet = sheet.float().mean(2, keepdim=True).to(torch.uint8)
    sheet = sheet.repeat_interleave(scale, -1).repeat_interleave(scale, -2).expand(-1, -1, 3, -1, -1)
    grid = torchvision.utils.make_grid(sheet.flatten(0, 1), nrow=each, padding=2, pad_value=255)   # (3, h, w)
    picture = Image.new("RGB", (grid.shape[2] + 24, grid.shape[1]), "white")
    picture.paste(Image.fromarray(grid.permute(1, 2, 0).contiguous().numpy()), (24, 0))
    for row, label in enumerate(classes):
        place = 4, row * (sheet.shape[3] + 2) + sheet.shape[3] // 2 - 4
        ImageDraw.Draw(picture).text(place, str(label), fill="black")
    write(picture, path, save=lambda picture, file: picture.save(file, format="PNG"))


def save_curves(path, epochs, teacher_acc=None):
    """A PNG with the student's scores on the left and the losses on the right, over the epochs.

    `epochs`: the rows of the log that end an epoch. Every loss is drawn over its largest absolute value, so
    that terms of different sizes can be seen in one picture; its first and last values stand in the legend.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("student_acc", "student"), ("agreement", "agreement with the teacher"),
                        ("agreement_drawn", "the same on drawn pictures"),
                        ("balanced_drawn", "the same, balanced over classes")):
        points = [(row["epoch"] + 1, 100 * row[name]) for row in epochs if row.get(name) is not None]
        if points:
            left.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)
    if teacher_acc is not None:
        left.axhline(100 * teacher_acc, color="gray", linestyle=":", label="teacher")
    left.set(title="scores, %", xlabel="epoch")
    if left.get_legend_handles_labels()[0]:
        left.legend(frameon=False, fontsize=8)
    losses = {name: [(row["epoch"] + 1, row[name]) for row in epochs if row.get(name) is not None]
              for name in dict.fromkeys(key for row in epochs for key in row if key.startswith("loss"))}
    for name, points in losses.items():
        largest = max((abs(value) for _, value in points), default=0)
        if largest:
            label = f"{name}: {points[0][1]:.3g} to {points[-1][1]:.3g}"
            right.plot([epoch for epoch, _ in points], [value / largest for _, value in points], label=label,
                       marker="." if len(points) < 30 else None)
    right.set(title="losses, each over its largest absolute value", xlabel="epoch")
    if any(max((abs(value) for _, value in points), default=0) for points in losses.values()):
        right.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.get_major_locator().set_params(integer=True)
    write(figure, path, save=lambda figure, file: figure.savefig(file, format="png", dpi=100))


_locks = contextlib.ExitStack()      # of run folders; they go with the process, however it ends


def _lock(folder, stack, wait=False):
    """Hold the folder until `stack` is closed. If another process holds it, wait, or raise BadInput."""
    try:
        import fcntl
    except ImportError:        # Windows
        return
    handle = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise BadInput(f"another process writes to {folder}; wait, or name another --out") from None
        print(f"another process makes {folder}; waiting for it", flush=True)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:            # a file system without locks
        pass


def command_line(main):
    """Decorates `main(argv=None)`. Bad input: one sentence, status 2. Ctrl-C: how to go on, status 130."""
    @functools.wraps(main)
    def wrapped(argv=None):
        Loop.latest = None
        try:
            with _locks:
                return main(argv)
        except BadInput as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except (FloatingPointError, OSError, torch.OutOfMemoryError) as error:
            last = Loop.latest
            where = f" in {last.counter} {last.next}" if last and not isinstance(error, OSError) else ""
            if isinstance(error, torch.OutOfMemoryError):
                error = "the GPU's memory is full; lower --batch-size, or another batch size of --help"
            where += f"; its last checkpoint: {last.path}" if last and last.path.exists() else ""
            print(f"stopped: {error}{where}", file=sys.stderr)
            raise SystemExit(1) from None
        except KeyboardInterrupt:
            last = Loop.latest
            run = last.run if isinstance(last, Stage) else last
            folder = f" with --resume --out {run.folder}" if isinstance(run, Run) else ""
            print(f"stopped; to go on, type the same command again{folder}", file=sys.stderr)
            raise SystemExit(130) from None
    return wrapped


@command_line
def main(argv=None):
    parser = Parser(prog="common.py", allow_abbrev=False,
                     description="Train a teacher on the real data and keep it in one file.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="model name, or module:function for a network of your own")
    what.add_argument("--inspect", help="a network, as --teacher takes it: say what it has, and stop")
    what.add_argument("--compare", nargs="+", metavar="NETWORK", help="a teacher and run folders of its "
                      "students: say how often they agree on --pictures, and stop")
    parser.add_argument("--pictures", help="folder:PATH with pictures of anything, for --compare")
    parser.add_argument("--dataset", default="cifar10", help=f"{dataset_names()} [cifar10]")
    parser.add_argument("--epochs", type=number_type(int, True), help="passes over the set [by data set]")
    parser.add_argument("--batch-size", type=number_type(int, True), help="[by data set]")
    parser.add_argument("--out", help="file [checkpoints/DATASET_MODEL.pt; methods look there for a name]")
    shared_flags(parser)
    options = parser.parse_args(argv)
    if options.inspect:
        print("\n".join(inspect_network(options.inspect)))
        return
    if options.compare:
        if len(options.compare) < 2 or not options.pictures:
            raise BadInput("--compare needs a teacher, its students and --pictures; for example: python "
                           "common.py --compare mine:teacher runs/one runs/other --pictures folder:photos")
        print("\n".join(compare_students(options.compare[0], options.compare[1:], options.pictures)))
        return
    set_up_device(options)
    if ":" not in options.model:
        check_model_name(options.model)
    if options.dataset not in DATASETS and not options.dataset.startswith("folder:"):
        raise BadInput(f"unknown data set '{options.dataset}'; choose from {dataset_names()}")
    path = Path(options.out) if options.out else teacher_path(options.dataset, options.model)
    if path.exists():
        raise BadInput(f"{path} is there already; name another file with --out, or move it away")
    recipe = recipe_of(options.model, options.dataset, options.epochs, options.batch_size)
    data = _spec_of(options.dataset)
    with seeded(0):
        model = build_model(options.model, data.num_classes, data.image_shape)
    for training in (False, True):
        check_answers(model, options.model, data, training)
    train_teacher(options.model, options.dataset, path, options, recipe)
    print(f"{path}: test accuracy {_shown(read_classifier(path)['test_acc'])}"
          + f"; use it with --teacher {path}" * (":" in options.model))

