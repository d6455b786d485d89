"""What was trained and how it went, read back from a run's folder."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from moe.config import load
from moe.errors import ConfigError
from moe.train.metrics import read


def inspect(folder: Path) -> dict[str, Any]:
    """Facts of a run: its model and data, loss from first to last, validation, speed, routing health per layer."""
    recipe_file = folder / "recipe.yaml"
    if not recipe_file.is_file():
        raise ConfigError(f"{folder} holds no run (there is no recipe.yaml); give the folder that `moe train` named at its end")
    recipe = load([recipe_file], []).model_dump(mode="json")
    rows = list(read(folder / "metrics.jsonl"))
    training = [row for row in rows if "loss" in row]
    validation = [row for row in rows if "validation_loss" in row]
    facts: dict[str, Any] = {
        "folder": str(folder),
        "recipe": recipe,
        "model": _json(folder / "model.json"),
        "environment": _json(folder / "environment.json"),
        "steps": {"done": training[-1]["step"] if training else 0, "planned": recipe["train"]["steps"]},
        "skipped": sum(not row.get("applied", True) for row in training),
        "checkpoints": sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-????????")),
        "samples": [str(path) for path in sorted((folder / "samples").glob("*.txt"))],
    }
    if training:
        rates = sorted(row["tokens_per_second"] for row in training)
        facts["loss"] = {"first": training[0]["loss"], "last": training[-1]["loss"]}
        facts["tokens_per_second"] = rates[len(rates) // 2]
        facts["memory_gib"] = max(row["memory_gib"] for row in training)
        facts["memory"] = _memory(training)
        facts["layers"] = {name: dict(layer) for name, layer in training[-1].get("layers", {}).items()}
        facts["stages"] = _stages(training)
        facts |= {name: training[-1][name] for name in ("tokens", "tokens_by_source", "epochs") if name in training[-1]}
    if validation:
        best = min(validation, key=lambda row: row["bits_per_byte"])
        facts["validation"] = {"last": validation[-1], "best": best}
        for layer, figures in validation[-1].get("layers", {}).items():
            facts.get("layers", {}).get(layer, {}).update(figures)
    return facts


def _stages(training: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Medians of each layer's figures of where the time goes over the recorded steps, the first left out where there are more."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in training:
        for name, layer in row.get("layers", {}).items():
            if "stages" in layer:
                found.setdefault(name, []).append(layer["stages"])
    return {name: _medians(rows[1:] or rows) | {"steps": len(rows[1:] or rows)} for name, rows in found.items()}


def _memory(training: list[dict[str, Any]]) -> dict[str, float]:
    """The most GiB of a GPU that any recorded step had when it began, and in each of its stages; empty for a run on a CPU."""
    found = [row["memory"] for row in training if "memory" in row]
    return {name: max(row.get(name, 0.0) for row in found) for name in dict.fromkeys(name for row in found for name in row)}


def _medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of each figure, in the sections in which the figures lie."""
    medians = {}
    for name in dict.fromkeys(name for row in found for name in row):
        values = [row[name] for row in found if name in row]
        medians[name] = _medians(values) if isinstance(values[0], dict) else statistics.median(values)
    return medians


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def health_line(layers: dict[str, dict[str, float]]) -> str:
    """Routing health over all layers in one line."""
    if not layers:
        return "routing: no MoE layer"
    worst = max(layers.values(), key=lambda layer: layer["max_over_mean"])["max_over_mean"]
    cv = sum(layer["cv"] for layer in layers.values()) / len(layers)
    dead = int(sum(layer["dead"] for layer in layers.values()))
    drops = max(layer.get("drop_rate", 0.0) for layer in layers.values())
    return f"routing: fullest expert {worst:.2f}x the mean, CV {cv:.2f}, {dead} dead, dropped {drops:.1%} ({len(layers)} layers)"


def show(facts: dict[str, Any], console: Console | None = None) -> None:
    """Print what `inspect` found."""
    model = facts["recipe"]["model"]
    lines = Table.grid(padding=(0, 2))
    moe = model.get("moe")
    shape = f"{model['layers']} layers, width {model['d_model']}"
    if moe:
        shape += f", {moe['experts']} experts of width {moe['d_expert']}, router {_router(moe['router'])}"
    lines.add_row("model", shape)
    if price := facts["model"]:
        lines.add_row("size", f"{price['parameters']:,} parameters, {price['active']:,} active a token")
    lines.add_row(
        "steps", f"{facts['steps']['done']} of {facts['steps']['planned']}" + (f", {facts['skipped']} skipped" if facts["skipped"] else "")
    )
    if "tokens_by_source" in facts:
        read_so_far = ", ".join(f"{name} {tokens:,} tokens" for name, tokens in facts["tokens_by_source"].items())
        lines.add_row("data", f"{read_so_far}; {facts['epochs']:.2f} epochs" + (" at most" if len(facts["tokens_by_source"]) > 1 else ""))
    if "loss" in facts:
        lines.add_row("loss", f"{facts['loss']['first']:.4f} → {facts['loss']['last']:.4f}")
    if "validation" in facts:
        last, best = facts["validation"]["last"], facts["validation"]["best"]
        lines.add_row(
            "validation",
            f"{last['bits_per_byte']:.3f} bits per byte at step {last['step']} (best {best['bits_per_byte']:.3f} at {best['step']})",
        )
    if "tokens_per_second" in facts:
        lines.add_row("speed", f"{facts['tokens_per_second']:,.0f} tokens/s")
        lines.add_row("memory", _memory_line(facts))
    lines.add_row("checkpoints", ", ".join(map(str, facts["checkpoints"])) or "none")
    lines.add_row("samples", ", ".join(Path(sample).name for sample in facts["samples"]) or "none")
    environment = facts["environment"]
    if environment:
        lines.add_row(
            "made with", f"moe {environment['moe']}, torch {environment['torch']}, commit {(environment['commit'] or 'unknown')[:12]}"
        )
    parts: list[Any] = [Text(facts["folder"], style="bold"), lines]
    if facts.get("layers"):
        parts += [Text(), Text(health_line(facts["layers"])), _layers(facts["layers"])]
    if facts.get("stages"):
        parts += [Text(), Text(_stages_line(facts["stages"])), _times(facts["stages"]), Text(), _travels(facts["stages"])]
    (console or Console()).print(Group(*parts))


def _memory_line(facts: dict[str, Any]) -> str:
    peak, stages = f"peak {facts['memory_gib']:.2f} GiB", dict(facts["memory"])
    if not stages:
        return f"{peak} of the first rank's process"
    resident = stages.pop("resident", 0.0)  # weights, gradients and optimizer state that outlive a step
    return f"{peak} a GPU, {resident:.2f} before a step\nby stage: " + ", ".join(f"{name} {gib:.2f}" for name, gib in stages.items())


def _router(router: dict[str, Any] | str) -> str:
    if isinstance(router, str):
        return router
    return router["name"] + (f" (k={router['k']})" if "k" in router else "")


def _layers(layers: dict[str, dict[str, float]]) -> Table:
    named = {"max_over_mean": "max/mean", "drop_rate": "drops", "auxiliary_loss": "aux loss"}  # the others are shown as they are called
    order = ("max_over_mean", "cv", "dead", "drop_rate", "entropy", "confidence", "auxiliary_loss", "churn")
    names = [name for name in order if any(name in layer for layer in layers.values())]
    table = Table("layer", *(named.get(name, name) for name in names), box=None, header_style="bold")
    for number, layer in layers.items():
        table.add_row(number, *(f"{layer[name]:.4g}" if name in layer else "" for name in names))
    return table


def _stages_line(layers: dict[str, dict[str, Any]]) -> str:
    steps = max(layer["steps"] for layer in layers.values())
    lost = sum(layer["imbalance_ms"] for layer in layers.values())
    return f"where the time goes: ms forward + backward, median of {steps} steps; imbalance {lost:.1f} ms"


def _times(layers: dict[str, dict[str, Any]]) -> Table:
    stages = list(dict.fromkeys(stage.removesuffix("_back") for layer in layers.values() for stage, ms in layer["ms"].items() if ms))
    table = Table("layer", *stages, "imbalance", "policy", box=None, pad_edge=False, header_style="bold")
    for number, layer in layers.items():
        times = (f"{layer['ms'][stage]:.1f}+{layer['ms'][stage + '_back']:.1f}" for stage in stages)
        table.add_row(number, *times, f"{layer['imbalance_ms']:.1f}", f"{layer['policy_ms']:.1f}")
    return table


def _travels(layers: dict[str, dict[str, Any]]) -> Table:
    named = {"load": "rank max/mean", "load_foreseen": "foreseen", "prediction_error": "error", "copies": "copies"}
    names = [name for name in named if any(layer.get(name) for layer in layers.values())]
    kinds = [kind for kind in ("tokens", "experts", "gradients") if any(layer["bytes"][kind] for layer in layers.values())]
    table = Table(
        "layer", *(named[name] for name in names), *("MiB: " * (kind == "tokens") + kind for kind in kinds), box=None, header_style="bold"
    )
    for number, layer in layers.items():
        figures = (f"{layer[name]:.3g}" if name in layer else "" for name in names)
        table.add_row(number, *figures, *(f"{layer['bytes'][kind] / 2**20:.3g}" for kind in kinds))
    return table
