"""What `decar inspect` shows of an ensemble directory. Knows its files, and where engines would run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from decar.router import Ensemble
from decar.router.errors import DecarError, StartError
from decar.server.placement import Gpu, Place, gib, place, visible_gpus

if TYPE_CHECKING:
    from decar.server.cluster.nodes import Held, Node


def inspect(directory: Path, console: Console, ray: str | None = None, placement: str | None = None) -> int:
    """Show the ensemble in ``directory`` on ``console``, and its problems on standard error; returns how many.

    Args:
        ray: the address of a Ray cluster that its engines are to be on; None: this machine.
        placement: on which nodes there.

    Raises:
        StartError: there is no such cluster, or it does not fit; or ``placement`` is given without one.
    """
    if placement is not None and ray is None:
        raise StartError(
            "--placement says where engines are to be in a Ray cluster: add --ray, or leave it out"
        )
    ensemble, problems = Ensemble.inspect(directory)
    if ensemble is not None:
        _describe(ensemble, console)
        if ray is None:
            _describe_places(ensemble, console)
        elif not problems:
            problems = _describe_nodes(ensemble, console, ray, placement)
        _describe_tokenizers(ensemble, console)
    for problem in problems:
        print(f"problem: {problem}", file=sys.stderr)
    if not problems:
        console.print("no problems found", style="green")
    return len(problems)


def _describe(ensemble: Ensemble, console: Console) -> None:
    manifest = ensemble.manifest
    console.print(f"[bold]{ensemble.name}[/bold]: router {manifest.router.kind}, rule {manifest.mixing.rule}")
    if manifest.flow is not None:
        steps = "one token a step" if manifest.flow.steps is None else f"{manifest.flow.steps} steps"
        blocks = "" if manifest.flow.block_length is None else f", blocks of {manifest.flow.block_length}"
        console.print(
            f"a flow ensemble: order {manifest.flow.order}, schedule {manifest.flow.schedule}, {steps}{blocks}, "
            f"mask token {manifest.flow.mask_token_id}"
        )
    columns = ("expert", "architecture", "parameters", "size", "prior", "vocab", "positions")
    table = Table(*columns, box=box.SIMPLE_HEAD)
    total = sum(expert.prior for expert in manifest.experts)
    for expert in ensemble.experts:
        try:
            parameters = f"{expert.num_parameters / 1e6:,.1f} M"
            size = f"{expert.weight_bytes / 2**20:,.1f} MiB"
        except (DecarError, OSError, ValueError):
            parameters = size = "unreadable"
        table.add_row(
            expert.name,
            expert.architecture,
            parameters,
            size,
            f"{expert.prior / total:.3f}",
            f"{expert.vocab_size:,}",
            f"{expert.max_positions:,}" if expert.max_positions else "?",
        )
    console.print(table)


def _describe_tokenizers(ensemble: Ensemble, console: Console) -> None:
    fingerprints: dict[str, list[str]] = {}
    for expert in ensemble.experts:
        try:
            fingerprint = expert.tokenizer_fingerprint
        except (DecarError, OSError, ValueError):
            fingerprint = "unreadable"
        fingerprints.setdefault(fingerprint, []).append(expert.name)
    for fingerprint, names in fingerprints.items():
        console.print(f"tokenizer {fingerprint}: {', '.join(names)}")


def _describe_nodes(ensemble: Ensemble, console: Console, ray: str, placement: str | None) -> list[str]:
    """Where `decar serve --ray` would put the engines, with its defaults; returns what is wrong there."""
    from decar.server.cluster.gpus import check_gateway, hold, places_on
    from decar.server.cluster.host import Host
    from decar.server.cluster.hosts import HostElsewhere, wrong_with
    from decar.server.cluster.nodes import Cluster, plan_on
    from decar.server.vllm_adapter.versions import is_cpu_build

    cluster, gateway = Cluster(ray), Host()
    try:
        plan = plan_on(cluster.nodes(), ensemble, placement, gpus=not is_cpu_build())
        of_gpus = ("GPU", "KV cache") if plan.held else ()
        table = Table("expert", "node", "address", "free CPUs", "weights", *of_gpus, box=box.SIMPLE_HEAD)
        problems: list[str] = []
        held: list[Held] = []
        places: list[Place] = []
        if plan.held:
            held = hold(cluster, plan)  # until this command ends: which ones Ray gives, only it can say
            try:
                check_gateway()
                places = places_on(plan, held, ensemble)
            except StartError as error:
                problems.append(str(error))
        for number, node in enumerate(plan.nodes):
            if held and plan.held[number]:
                _describe_gpus(console, node, held[number])
            host: Any = HostElsewhere(cluster.begin(node), node.name) if number else gateway
            facts = host.facts()
            for k, (expert, at) in enumerate(zip(ensemble.experts, plan.of, strict=True)):
                if at == number:
                    wrong = wrong_with(node, host, facts, gateway.facts(), [expert.path])
                    problems += [problem for problem in wrong if problem not in problems]
                    weights = "see below" if wrong else gib(expert.weight_bytes, 2)
                    row = [expert.name, node.name, node.address, f"{node.cpus:g}", weights]
                    if plan.held:
                        row += [_gpus_of(places[k]), _kv_of(places[k])] if places else ["see below", ""]
                    table.add_row(*row)
        console.print(table)
        return problems
    finally:
        cluster.close()
        gateway.close()


def _describe_gpus(console: Console, node: Node, held: Held) -> None:
    """What GPUs a node has."""
    shown = ", ".join(f"GPU {gpu.index} ({gpu.name}, {gib(gpu.total_bytes, 0)})" for gpu in held.seen)
    free = f"{node.gpus:g} of {node.all_gpus} free in Ray's books"
    console.print(f"node {node.name}: {shown or 'nvidia-smi shows no GPU'}; {free}", soft_wrap=True)


def _describe_places(ensemble: Ensemble, console: Console) -> None:
    """Where `decar serve` would put the engines on this machine, with its defaults."""
    try:
        gpus = visible_gpus()
        places = place(ensemble, gpus)
    except (DecarError, OSError) as error:
        console.print(f"no place for its engines on this machine: {error}", style="yellow")
        return
    table = Table("expert", "runs on", "weights", "KV cache", "besides", "in all", box=box.SIMPLE_HEAD)
    for placed in places:
        table.add_row(
            placed.expert,
            _where(placed, gpus),
            gib(placed.weight_bytes, 2),
            _kv_of(placed),
            f"about {gib(placed.ranks * placed.overhead_bytes, 2)}",
            f"{'at least' if placed.kv_bytes is None else 'about'} {gib(placed.ranks * placed.needed_bytes, 2)}",
        )
    console.print(table)


def _where(placed: Place, gpus: Sequence[Gpu]) -> str:
    if not placed.gpus:
        return "CPU" if placed.ranks == 1 else f"CPU, {placed.ranks} processes"
    return " and ".join(f"GPU {gpu} ({gpus[gpu].name})" for gpu in placed.gpus)


def _gpus_of(placed: Place) -> str:
    return " and ".join(map(str, placed.gpus))


def _kv_of(placed: Place) -> str:
    return "what is left" if placed.kv_bytes is None else gib(placed.ranks * placed.kv_bytes, 2)
