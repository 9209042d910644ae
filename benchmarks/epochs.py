"""Could one choose an epoch's student without test data?   Rules for it, tried on finished runs.

    python cudfkd.py --dataset digits --keep-epochs --out runs/kept
    python benchmarks/epochs.py runs/kept [MORE_RUN_FOLDERS ...] --log benchmarks/results/epochs.jsonl

A run with --keep-epochs keeps the student of each epoch and up to 200 of its last images. Each rule below
looks at them and names one epoch, among equals the first; the test scores of the log then say what the choice
was worth, beside the last epoch and beside the best, which only the test set can name.

    last             the last epoch, what the scripts report
    kd-loss          the smallest distillation loss in the log
    agreement        the student that agrees most often with the teacher on the images of all epochs
    agreement-leaves the same on the 2,000 drawn pictures of common.py, dead leaves that no run was shown; for
                     a run on leaves they are of the kind that it learned from
    agreement-pictures the same on 1,000 pictures of a folder, with --pictures folder:PATH
    balanced-...     the same three, averaged over the classes that the teacher names
    entropy          the epoch whose images the teacher is most certain of (least mean entropy)
    bn-distance      the epoch whose images are nearest to what the teacher's BatchNorm layers remember:
                     CSD's bn_loss. Not for a teacher without BatchNorm
"""
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import (BadInput, ImageSet, agreement, balanced_agreement, batchnorms, drawn_pictures,
                    from_function, frozen, normalize, predict, recorded_statistics, scoring, seeded,
                    some_pictures)
from csd import bn_loss
from pictures import read_log
from running import Parser, command_line, is_file_name, load_classifier, number_type, read_file, teacher_path


def load(name, dataset=None):
    """A student's file, or a teacher as --teacher takes it.   -> the network, in eval mode, its DataSpec"""
    if ":" in name and not is_file_name(name):
        network, data = from_function(name, pretrained=True)
        network.eval()
    else:
        network, data = load_classifier(name if is_file_name(name) else teacher_path(dataset, name))
    return network.to("cuda" if torch.cuda.is_available() else "cpu"), data


@torch.no_grad()
def bn_distance(teacher, pixels, data):
    layers = batchnorms(teacher, data)
    with frozen(teacher), scoring(), recorded_statistics(layers) as seen:
        teacher(normalize(pixels / 255, data))
    return float(bn_loss([seen[layer] for layer in layers],
                         [(layer.running_mean, layer.running_var) for layer in layers]))


def measures(folder, rows, pictures=None):
    """-> {rule: a number an epoch, the largest is chosen}"""
    arguments = rows[0]["arguments"]
    teacher, data = load(arguments["teacher"], arguments["dataset"])
    student, of_student = load(f"{folder}/student.pt")
    data = data or of_student                              # a function may return a network alone
    device = next(teacher.parameters()).device
    epochs = [row["epoch"] for row in rows if row["event"] == "epoch"]
    kept = [read_file(Path(folder, f"epochs/{epoch}.pt"), "student of --keep-epochs") for epoch in epochs]
    for each in kept:
        each["pixels"] = each["pixels"].to(device)
    own = ImageSet(torch.cat([each["pixels"] for each in kept]), None)
    leaves = ImageSet(drawn_pictures(data).pixels.to(device), None)
    sets = [("agreement", own), ("agreement-leaves", leaves)]
    if pictures:
        with seeded(0):                                    # the same ones for all runs
            shown = some_pictures(pictures, 1000, data).to(device)
        sets.append(("agreement-pictures", ImageSet(shown, None, 1)))
    found = {"last": epochs, "kd-loss": [-row["loss_kd"] for row in rows if row["event"] == "epoch"]}
    for rule, images in sets:
        answers, found[rule], balanced = predict(teacher, images, data), [], []
        for each in kept:
            student.load_state_dict(each["student"])
            logits = predict(student, images, data)
            found[rule].append(agreement(logits, answers))
            balanced.append(balanced_agreement(logits, answers))
        found[rule.replace("agreement", "balanced")] = balanced
    p = [predict(teacher, ImageSet(each["pixels"], None), data).softmax(1) for each in kept]
    found["entropy"] = [float(torch.xlogy(each, each).sum(1).mean()) for each in p]
    if batchnorms(teacher, data):
        found["bn-distance"] = [-bn_distance(teacher, each["pixels"], data) for each in kept]
    return found


@command_line
def main(argv=None):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run folders of finished runs with --keep-epochs")
    parser.add_argument("--pictures", help="folder:PATH, with which agreement-pictures is measured")
    parser.add_argument("--threads", type=number_type(int, True), help="CPU threads [as PyTorch chooses]")
    parser.add_argument("--log", help="append the results to this file, as JSON lines")
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    for folder in options.runs:
        rows = read_log(folder)
        if rows[0]["method"] == "regulated_kd":
            print(f"{folder}: left out, because its images are real ones")
            continue
        scores = [row["student_acc"] for row in rows if row["event"] == "epoch"]
        if rows[-1]["event"] != "end" or None in scores or not Path(folder, "epochs").is_dir():
            raise BadInput(f"{folder} is no finished run with --keep-epochs and a score in each epoch; name "
                           "those that are")
        found = measures(folder, rows, options.pictures)
        chosen = {rule: max(range(len(scores)), key=values.__getitem__) for rule, values in found.items()}
        arguments = rows[0]["arguments"]
        row = dict(variant="epochs", method=rows[0]["method"], changed=rows[0]["changed"],
                   teacher_sha256=rows[0]["teacher_sha256"], versions=rows[0]["versions"],
                   pictures=options.pictures,
                   **{name: arguments[name] for name in ("preset", "dataset", "seed", "out", "teacher")},
                   student_acc=scores, chosen=chosen, measures=found)
        print(f"{folder}: best {max(scores):.4f}; " + ", ".join(
            f"{rule} {scores[epoch]:.4f} ({epoch})" for rule, epoch in chosen.items()), flush=True)
        if options.log:
            with open(options.log, "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
