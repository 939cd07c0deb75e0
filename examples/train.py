"""Train a small Swin on scikit-learn's handwritten digits: minutes on a CPU, and a file to start your own from.

    python examples/train.py                                      one process, on the GPU or the CPU
    torchrun --nproc-per-node 2 examples/train.py                 several, with DistributedDataParallel

The output folder gets log.csv (each step), checkpoint.pt (each epoch) and curve.png. A run that was killed goes on from
its checkpoint when it is started again with the same arguments, and its losses are those of a run that was not: what is
random in a step depends on the seed and the step alone. To start over, name another folder.
"""

import argparse
import copy
import csv
import math
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from swinops.models.swin import SwinTransformer

COLUMNS = ("step", "epoch", "loss", "lr", "test_accuracy", "ema_accuracy")
RESUMABLE = ("device", "output")  # what a run that goes on may change


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--epochs", type=int, default=16)
    add("--batch-size", type=int, default=64, help="of all processes together (64)")
    add("--lr", type=float, default=2e-3, help="after warm-up; then half a cosine to zero (2e-3)")
    add("--warmup-epochs", type=int, default=3)
    add("--weight-decay", type=float, default=0.05, help="not of norms, biases and bias tables (0.05)")
    add("--drop-path", type=float, default=0.1, help="stochastic depth of the last block (0.1)")
    add("--label-smoothing", type=float, default=0.1)
    add("--clip-grad", type=float, default=1.0, help="largest norm of all gradients (1.0)")
    add("--ema-decay", type=float, default=0.99, help="of the average of parameters that is tested too (0.99)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="autocast to bfloat16, or float16 where a GPU has none (on a GPU; most CPUs are slower with it)",
    )
    add("--train-images", type=int, default=1437, help="how many of the 1437 to train on")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--output", type=Path, default=Path("train-digits"), help="folder (train-digits)")
    arguments = parser.parse_args()
    if arguments.amp is None:
        arguments.amp = arguments.device.startswith("cuda")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.batch_size < 1 or arguments.batch_size % world:
        parser.error(f"--batch-size must be a positive multiple of the {world} processes, got {arguments.batch_size}")
    if not arguments.batch_size <= arguments.train_images <= 1437:
        parser.error(f"--train-images must be from --batch-size to 1437, got {arguments.train_images}")
    if not 0 <= arguments.warmup_epochs < arguments.epochs:
        parser.error(f"--warmup-epochs must be from 0 to less than --epochs, got {arguments.warmup_epochs}")
    return arguments


def digits(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images, 8 x 8 upscaled to [N, 1, 32, 32], with their labels [N]: 1437 and 360."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    images = F.interpolate(images, size=32, mode="bicubic").to(device)
    labels = torch.from_numpy(data.target).to(device)
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=data.target, random_state=0)
    return images[train], labels[train], images[test], labels[test]


def augment(images: Tensor) -> Tensor:
    """Each image turned by up to 10 degrees, scaled by up to a tenth and moved by up to a tenth of its side."""
    turn, size, right, down = (torch.rand(4, len(images), device=images.device) * 2 - 1).unbind()
    turn, size = turn * math.radians(10), 1 + size / 10
    cos, sin = size * turn.cos(), size * turn.sin()
    rows = torch.stack([cos, -sin, right / 5, sin, cos, down / 5], 1)
    grid = F.affine_grid(rows.view(-1, 2, 3), images.shape, align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def make_optimizer(model: SwinTransformer, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW, without weight decay on norms and biases, which are 1-D, and on the model's own list."""
    spared = model.no_weight_decay()
    named = list(model.named_parameters())
    decayed = [p for name, p in named if p.dim() > 1 and name not in spared]
    others = [p for name, p in named if p.dim() == 1 or name in spared]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)


def learning_rate(step: int, warmup: int, total: int, highest: float) -> float:
    if step < warmup:
        return highest * (step + 1) / warmup
    return highest * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    training = model.training
    model.eval()
    right = (model(images).argmax(1) == labels).float().mean().item()
    model.train(training)
    return right


def replace(path: Path, write) -> None:
    """Written beside its place and renamed: there is always a whole file."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def read_log(path: Path, steps: int) -> list[dict[str, str]]:
    """The rows of the steps that the checkpoint has made; a killed run may have logged more."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["ema_accuracy"] is not None and int(row["step"]) < steps]


def write_log(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    per_epoch = len(rows) / (1 + int(rows[-1]["epoch"]))
    at = [(int(row["step"]) + 1) / per_epoch for row in rows]
    losses = [float(row["loss"]) for row in rows]
    left.plot(at, losses, color="tab:blue", alpha=0.25, linewidth=1, label="each step")
    window = max(1, round(per_epoch))
    means = [sum(losses[i + 1 - window : i + 1]) / window for i in range(window - 1, len(losses))]
    left.plot(at[window - 1 :], means, color="tab:blue", label="mean of an epoch")
    left.set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    tested = [(x, row) for x, row in zip(at, rows, strict=True) if row["test_accuracy"]]
    for column, label in (("test_accuracy", "parameters"), ("ema_accuracy", "their moving average")):
        right.plot([x for x, _ in tested], [100 * float(row[column]) for _, row in tested], ".-", label=label)
    right.axhline(95, color="gray", linewidth=1, linestyle=":")
    right.set(xlabel="epoch", ylabel="test accuracy, %", ylim=(None, 100.5))
    for axes in (left, right):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle("A small Swin on handwritten digits, 32 x 32", fontsize=11)
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)


def main() -> None:
    arguments = parse()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(arguments.device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
    try:
        train(arguments, device, rank, world)
    finally:
        if world > 1:
            dist.destroy_process_group()


def train(arguments: argparse.Namespace, device: torch.device, rank: int, world: int) -> None:
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in vars(arguments).items() if name not in RESUMABLE} | {"processes": world}
    images, labels, test_images, test_labels = digits(device)
    images, labels = images[: arguments.train_images], labels[: arguments.train_images]

    torch.manual_seed(arguments.seed)
    model = SwinTransformer(
        img_size=32, patch_size=4, in_chans=1, num_classes=10, embed_dim=48, depths=(2, 2), num_heads=(3, 6),
        window_size=4, drop_path_rate=arguments.drop_path,
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.Linear):  # with the published deviation of 0.02 so narrow a model hardly starts
            nn.init.xavier_uniform_(module.weight)
    model.to(device)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(arguments.ema_decay))
    optimizer = make_optimizer(model, arguments.lr, arguments.weight_decay)
    bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported()
    scaler = torch.amp.GradScaler(device.type, enabled=arguments.amp and not bfloat16)
    state = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler}

    done = 0
    if (folder / "checkpoint.pt").exists():
        saved = torch.load(folder / "checkpoint.pt", map_location=device, weights_only=True)
        before = saved["settings"]
        changed = [f"{name} {before.get(name)}" for name, x in settings.items() if before.get(name) != x]
        if changed:
            raise SystemExit(
                f"{folder} holds a run with other settings ({', '.join(changed)}): choose another --output"
            )
        for name, part in state.items():
            part.load_state_dict(saved[name])
        done = saved["step"]
    rows = read_log(folder / "log.csv", done)
    if len(rows) != done:
        raise SystemExit(f"{folder}/log.csv must hold the {done} steps of the checkpoint, got {len(rows)}")
    if rank == 0:
        replace(folder / "log.csv", lambda path: write_log(path, rows))

    steps = len(images) // arguments.batch_size  # of an epoch
    total = arguments.epochs * steps
    parallel = DistributedDataParallel(model) if world > 1 else model
    model.train()
    bar = tqdm(total=total, initial=done, disable=rank > 0, unit="step")
    for step in range(done, total):
        epoch, place = divmod(step, steps)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(arguments.seed + epoch))
        batch = order[place * arguments.batch_size : (place + 1) * arguments.batch_size].to(device)
        # every process augments the whole batch, so that the images do not depend on how many there are
        torch.manual_seed(hash((arguments.seed, step)))
        inputs, targets = augment(images[batch])[rank::world], labels[batch][rank::world]
        torch.manual_seed(hash((arguments.seed, step, rank)))  # of stochastic depth
        lr = learning_rate(step, arguments.warmup_epochs * steps, total, arguments.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(device.type, torch.bfloat16 if bfloat16 else torch.float16, enabled=arguments.amp):
            logits = parallel(inputs)
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=arguments.label_smoothing)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), arguments.clip_grad)
        scaler.step(optimizer)
        scaler.update()
        ema.update_parameters(model)

        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
        row = dict.fromkeys(COLUMNS, "") | {"step": step, "epoch": epoch, "loss": (loss / world).item(), "lr": lr}
        if place == steps - 1:
            row["test_accuracy"] = accuracy(model, test_images, test_labels)
            row["ema_accuracy"] = accuracy(ema, test_images, test_labels)
            bar.set_postfix({"loss": f"{row['loss']:.3f}", "test": f"{row['ema_accuracy']:.1%}"})
        rows.append({name: str(value) for name, value in row.items()})
        bar.update()
        if rank == 0:
            with (folder / "log.csv").open("a", newline="") as file:
                csv.DictWriter(file, COLUMNS).writerow(rows[-1])
            if place == steps - 1:
                saved = {name: copy.copy(part.state_dict()) for name, part in state.items()}
                saved |= {"step": step + 1, "settings": settings}
                replace(folder / "checkpoint.pt", lambda path, saved=saved: torch.save(saved, path))
                replace(folder / "curve.png", lambda path: draw(rows, path))
    bar.close()
    if rank == 0:
        print(
            f"test accuracy {float(rows[-1]['test_accuracy']):.1%}, of the moving average "
            f"{float(rows[-1]['ema_accuracy']):.1%}; written: log.csv, checkpoint.pt, curve.png in {folder}"
        )


if __name__ == "__main__":
    main()
