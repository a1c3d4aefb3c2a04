"""`drpo-megatron slurm`: a run as a Slurm job. `submit` is for users, the other actions for the job's script."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drpo_megatron.commands import BadInput, RunFailed
from drpo_megatron.commands.arguments import memory_size, slurm_time, whole
from drpo_megatron.commands.plan import what_to_change
from drpo_megatron.files import write_text

if TYPE_CHECKING:
    from drpo_megatron.config import Config
    from drpo_megatron.orchestration.run_directory import RunDirectory
    from drpo_megatron.slurm.layout import Nodes
    from drpo_megatron.slurm.script import Job

_HELP = """\
Submit a run as a Slurm job that survives time limits, preemption and the loss of a node: it is requeued, and goes on
after its newest checkpoint. Everything that can be checked here is checked first. KEY=VALUE overrides a key of the file.
The recipe is brought to the job's number of GPUs: engines keep their share, data parallelism takes the rest.

examples:
  drpo-megatron slurm submit examples/qwen3_30b_a3b_bf16.yaml --nodes 8 --time 24:00:00 --partition gpu
  drpo-megatron slurm submit examples/qwen3_30b_a3b_bf16.yaml --nodes 8 --dry-run     print the script, submit nothing
  drpo-megatron slurm submit examples/quickstart.yaml --nodes 2 --gpus-per-node 0     ranks on CPUs
  drpo-megatron slurm submit --resume /shared/runs/my-run --nodes 4                   continue, here on fewer nodes
"""
_PATIENCE_S = 600.0
"""How long nodes wait for each other. The first import from a busy shared file system takes minutes."""


def add(commands: Any, style: dict[str, Any]) -> None:
    parser = commands.add_parser("slurm", help="submit a run as a Slurm job", description=_HELP, **style)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    submit = actions.add_parser("submit", help="check a run, write its script, submit it", description=_HELP, **style)
    submit.add_argument("arguments", nargs="*", metavar="FILE KEY=VALUE", help="the recipe's YAML file, then overrides")
    submit.add_argument("--resume", metavar="RUN_DIR", type=Path, help="continue this run after its newest checkpoint")
    submit.add_argument("--nodes", type=whole(1, 2**17), required=True, metavar="N", help="machines of the job")
    submit.add_argument(
        "--gpus-per-node", type=whole(0, 1024), metavar="N", help="default: 8, or 0 with trainer.backend=cpu"
    )
    submit.add_argument(
        "--gpu-memory", type=memory_size, metavar="SIZE", default="80GB", help="of one GPU; default 80GB"
    )
    for option, kind in (("time", slurm_time), ("partition", str), ("account", str)):
        submit.add_argument(
            f"--{option}", type=kind, metavar=option.upper(), help=f"sbatch --{option}; default: the cluster's"
        )
    submit.add_argument("--container", metavar="IMAGE", help="run in this image (srun --container-image, pyxis)")
    submit.add_argument("--assume-shared", action="store_true", help="all nodes see the run directory, believe me")
    submit.add_argument("--dry-run", action="store_true", help="check, print the script, write and submit nothing")
    submit.set_defaults(run=_submit)

    for name, run, text in (("check", _check, "this node against the others"), ("ray", _ray, "Ray on this node")):
        action = actions.add_parser(name, help=f"{text}; run by the job's script", **style)
        action.add_argument("job_dir", type=Path, metavar="JOB_DIR")
        action.set_defaults(run=run)


def _submit(args: argparse.Namespace) -> None:
    try:
        config, run, job = _prepare(args)
        from drpo_megatron.slurm.script import sbatch_script

        script = sbatch_script(job)
        if args.dry_run:
            print(script, end="")
            return
        if shutil.which("sbatch") is None:
            raise ValueError(
                "sbatch is not on the PATH of this machine; submit from a login node of the cluster, "
                "or write the script with --dry-run and take it there"
            )
        run = _write(config, run, script)
    except (ValueError, OSError) as error:
        raise BadInput(error) from error
    done = subprocess.run(["sbatch", "--parsable", str(_script_file(run))], capture_output=True, text=True)
    if done.returncode:
        raise RunFailed(f"sbatch refused {_script_file(run)}: {done.stderr.strip()}")
    job_id = done.stdout.strip().partition(";")[0]
    print(f"job {job_id} submitted: {run.path}")
    print(f"  output of the job    {run.path}/slurm/{job_id}.out")
    print(f"  output by process    {run.logs}/")
    print(f"  stop and save        scancel --signal=USR1 --batch {job_id}    (it is requeued)")


def _prepare(args: argparse.Namespace) -> tuple[Config, RunDirectory | None, Job]:
    """Everything that can be wrong is found here. With --resume, also the run's directory."""
    from drpo_megatron.config.checks import check_config
    from drpo_megatron.orchestration.run import read_inputs
    from drpo_megatron.orchestration.run_directory import RunDirectory, planned_path
    from drpo_megatron.slurm.files import MOUNTS_FILE, check_shared, read_mounts
    from drpo_megatron.slurm.layout import neighbours_note, on_nodes

    run, config = RunDirectory.from_arguments(args.arguments, args.resume, example="examples/qwen3_30b_a3b_bf16.yaml")
    nodes = _nodes(args, config)
    config = on_nodes(config, nodes)
    warnings = check_config(config)
    _check_fit(config, nodes, args.gpu_memory)
    read_inputs(config)
    path = (run.path if run else planned_path(config)).absolute()
    if nodes.count > 1 and not args.assume_shared:
        check_shared(path, read_mounts(MOUNTS_FILE.read_text(encoding="utf-8")))
    note = neighbours_note(config, nodes)
    for warning in [*warnings, *([note] if note else [])]:
        print(f"warning: {warning}", file=sys.stderr)
    run_section = config.run.model_copy(update={"run_dir": str(path)})
    return config.model_copy(update={"run": run_section}), run, _job(args, config, nodes, path)


def _nodes(args: argparse.Namespace, config: Config) -> Nodes:
    from drpo_megatron.slurm.layout import Nodes

    default = 0 if config.trainer.backend == "cpu" else 8
    return Nodes(args.nodes, default if args.gpus_per_node is None else args.gpus_per_node)


def _check_fit(config: Config, nodes: Nodes, gpu_bytes: int) -> None:
    if not nodes.gpus_each:
        return
    from drpo_megatron.config.hf_config import read_hf_config
    from drpo_megatron.planner.model import read_model
    from drpo_megatron.planner.plan import make_plan

    hf_config, model = read_hf_config(config.model.hf_path), read_model(config.model.hf_path)
    plan = make_plan(config, model, gpu_bytes)
    if not plan.fits:
        raise ValueError(what_to_change(config, hf_config, model, plan))


def _job(args: argparse.Namespace, config: Config, nodes: Nodes, run_dir: Path) -> Job:
    from drpo_megatron.slurm.script import Job

    python = "python3" if args.container else sys.executable
    model = Path(config.model.hf_path).absolute()
    data = [Path(path).absolute().parent for path in (config.data.train, config.data.heldout) if path]
    mounts = dict.fromkeys(str(path) for path in (Path.cwd(), run_dir.parent, model, *data))
    return Job(
        name=config.run.name,
        nodes=nodes,
        run_dir=str(run_dir),
        working_dir=os.getcwd(),
        program=(python, "-m", "drpo_megatron.cli"),
        time=args.time,
        partition=args.partition,
        account=args.account,
        container=args.container,
        mounts=tuple(mounts),
    )


def _script_file(run: RunDirectory) -> Path:
    return run.path / "slurm" / "train.sbatch"


def _write(config: Config, run: RunDirectory | None, script: str) -> RunDirectory:
    from drpo_megatron.orchestration.run_directory import RunDirectory

    if run is None:
        run = RunDirectory.create(config)
    else:
        with run.locked():
            run.save_config(config)
    file = _script_file(run)
    file.parent.mkdir(exist_ok=True)
    write_text(file, script)
    return run


# --- what the script runs on every node ---------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    try:
        node, num_nodes = _in_job("SLURMD_NODENAME"), int(_in_job("SLURM_STEP_NUM_NODES"))
        from drpo_megatron.slurm.environment import compare, look

        look(args.job_dir, node)
        if _is_first():
            compare(args.job_dir, num_nodes, _PATIENCE_S)
            print(f"{num_nodes} node(s) have the same packages and GPUs and see the run and the model")
    except (ValueError, OSError) as error:
        raise BadInput(error) from error


def _ray(args: argparse.Namespace) -> None:
    from drpo_megatron.slurm.ray_node import run_node

    try:
        code = run_node(
            args.job_dir,
            _in_job("SLURMD_NODENAME"),
            is_head=_is_first(),
            num_cpus=int(_in_job("SLURM_CPUS_ON_NODE")),
            timeout_s=_PATIENCE_S,
        )
    except (ValueError, OSError) as error:
        raise RunFailed(error) from error
    if code:
        raise RunFailed(f"Ray ended with exit code {code}")


def _is_first() -> bool:
    return _in_job("SLURM_PROCID") == "0"


def _in_job(name: str) -> str:
    """What Slurm tells the processes of a job step. ValueError outside of one."""
    if name not in os.environ:
        raise ValueError(
            f"{name} is not set: this is run by the script of a Slurm job on its nodes; to submit one: drpo-megatron slurm "
            "submit"
        )
    return os.environ[name]
