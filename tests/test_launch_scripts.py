"""Launch scripts of scripts/launch/: the commands and ranks they start, and how they handle the exit."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cat_fast.training.health.run_status import summarize
from cat_fast.training.metrics.run_log import read_metrics
from tests.training.runs import TOKENIZER

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts/launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir())


@pytest.fixture
def tools(tmp_path):
    """Function `tools(name, script)` that puts a stand-in for a program first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def put(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(0o755)
        return path

    return put


def launch(script: str, *arguments: str, tmp_path: Path, **environment: str) -> subprocess.CompletedProcess:
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        env={**os.environ, "PATH": path, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_parses_and_can_be_started(script):
    subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
    assert os.access(LAUNCH / script, os.X_OK)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_passes(script):
    if not (shellcheck := shutil.which("shellcheck")):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(LAUNCH / script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_without_arguments_a_script_prints_its_usage(script, tmp_path):
    done = launch(script, tmp_path=tmp_path)
    assert done.returncode == 2
    assert f"scripts/launch/{script}" in done.stdout + done.stderr
    argument = "CORPUS" if script == "gpu_nano.sh" else "CONFIG"
    assert argument in done.stdout + done.stderr


@pytest.mark.slow
def test_one_node_trains_on_a_cpu(tmp_path):
    run = tmp_path / "run"
    more = [f"output_dir={run}", "schedule.total_steps=2", "schedule.warmup_steps=1"]
    done = launch(
        "one_node.sh",
        *TOKENIZER,
        *more,
        tmp_path=tmp_path,
        CUDA_VISIBLE_DEVICES="",
        OMP_NUM_THREADS="1",
        RANKS="2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [record["step"] for record in read_metrics(run)] == [0, 1]
    assert read_metrics(run)[0]["images"] == 4  # two ranks of two
    assert (run / "model").is_dir()
    assert "2 steps in" in done.stdout


def test_after_sigterm_one_node_lets_its_ranks_save_and_exits_with_0(tmp_path):
    run = tmp_path / "run"
    given = [*TOKENIZER, f"output_dir={run}", "schedule.total_steps=100000", "schedule.warmup_steps=1"]
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "RANKS": "2"}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            ["bash", str(LAUNCH / "one_node.sh"), *given],
            env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 300
        while len(read_metrics(run)) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    state = summarize(run)
    assert state
    assert (state.state, state.step) == ("preempted", len(read_metrics(run)))
    assert "checkpoint saved; resume with" in (tmp_path / "log").read_text()


def test_one_node_exits_with_the_exit_code_of_the_run(tmp_path, tools):
    python = tools("python", "[[ $1 == -c ]] && { echo 0 2 12345; exit; }\nexit 7")
    done = launch(
        "one_node.sh", "config.yaml", tmp_path=tmp_path, PYTHON=str(python), CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 7


PRINTING_PYTHON = """
[[ $1 == -c ]] && {{ echo {gpus} {gpus} 12345; exit; }}
printf '%s\\n' "$@"
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"CUDA_VISIBLE_DEVICES": ""}, ["--num_gpus", "8"]),
        ({"CUDA_VISIBLE_DEVICES": "2,3"}, []),  # DeepSpeed reads it
        ({"CUDA_VISIBLE_DEVICES": "2,3", "RANKS": "1"}, ["--num_gpus", "1"]),
    ],
)
def test_one_node_takes_all_gpus_or_those_chosen(tmp_path, tools, environment, expected):
    python = tools("python", PRINTING_PYTHON.format(gpus=8))
    done = launch("one_node.sh", "a.yaml", "b=c d", tmp_path=tmp_path, PYTHON=str(python), **environment)
    assert done.stdout.splitlines() == [
        *("-m", "cat_fast.processes.group", str(python)),
        *("-m", "deepspeed.launcher.runner", *expected, "--master_port", "12345"),
        *("--module", "cat_fast.train", "a.yaml", "b=c d"),
    ]


def test_several_nodes_starts_deepspeed_from_the_hostfile(tmp_path, tools):
    hosts = tmp_path / "hosts"
    hosts.write_text("# mine\nnode1 slots=8\n\nnode2 slots=4 # half\n")
    tools("pdsh", "exit 0")
    tools("ssh", f'echo "$@" >> {tmp_path}/calls')
    python = tools("python", PRINTING_PYTHON.format(gpus=0))
    done = launch("several_nodes.sh", str(hosts), "a.yaml", "b=c", tmp_path=tmp_path, PYTHON=str(python))
    assert done.stdout.splitlines() == [
        *("-m", "deepspeed.launcher.runner", "--hostfile", str(hosts)),
        *("--master_addr", "node1", "--master_port", "29500", "--module", "cat_fast.train", "a.yaml", "b=c"),
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[4:] for line in calls] == [[n, "test", "-d", str(ROOT)] for n in ("node1", "node2")]


@pytest.mark.parametrize(
    ("hosts", "pdsh", "ssh", "message"),
    [
        (None, True, "exit 0", "no such file; expected one line per machine, such as 'node1 slots=8'"),
        ("# none yet\n", True, "exit 0", "no machine found"),
        ("node1 slots=8\n", False, "exit 0", "pdsh, which is not installed"),
        ("node1 slots=8\nnode2 slots=8\n", True, "[[ $5 == node1 ]]", "error: node2: cannot be reached"),
    ],
)
def test_several_nodes_checks_its_requirements_before_it_starts(tmp_path, tools, hosts, pdsh, ssh, message):
    if hosts is not None:
        (tmp_path / "hosts").write_text(hosts)
    if pdsh:
        tools("pdsh", "exit 0")
    elif shutil.which("pdsh"):
        pytest.skip("pdsh is installed")
    tools("ssh", ssh)
    python = tools("python", "echo started")
    done = launch(
        "several_nodes.sh", str(tmp_path / "hosts"), "a.yaml", tmp_path=tmp_path, PYTHON=str(python)
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert "started" not in done.stdout


SRUN = """
echo "srun $1" >&2
shift
for task in 0 1 2 3; do
  SLURM_PROCID=$task SLURM_LOCALID=$((task % 2)) SLURM_NTASKS=4 "$@" || exit $?
done
"""
PYTHON = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $PPID $*"\nexit ${EXIT:-0}'


@pytest.fixture
def slurm(tmp_path, tools):
    """Function that runs a job on a fake cluster of two nodes with two tasks each; python prints its rank."""
    tools("srun", SRUN)
    tools("scontrol", f'[[ $1 == show ]] && printf "gpu7\\ngpu8\\n" || echo "$@" >> {tmp_path}/requeued')
    python = tools("python", PYTHON)
    job = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "gpu[7-8]", "PYTHON": str(python)}
    return lambda *arguments, **more: launch("slurm.sbatch", *arguments, tmp_path=tmp_path, **job, **more)


def test_slurm_starts_one_rank_per_task(slurm, tmp_path):
    done = slurm("a.yaml", f"output_dir={tmp_path}/my run", "b=$HOME")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[:4] for line in lines] == [
        ["0", "0", "4", "gpu7:21234"],
        ["1", "1", "4", "gpu7:21234"],
        ["2", "0", "4", "gpu7:21234"],
        ["3", "1", "4", "gpu7:21234"],
    ]
    for line in lines:  # spaces and dollar signs are not expanded
        assert line.endswith(f"-u -m cat_fast.train a.yaml output_dir={tmp_path}/my run b=$HOME")
    # Because of exec, python replaces the task's shell: signals reach it, and its parent is srun.
    assert len({line.split()[4] for line in lines}) == 1
    assert "srun --kill-on-bad-exit=1" in done.stderr
    assert not (tmp_path / "requeued").exists()


def test_a_requeued_slurm_job_resumes_its_run(slurm, tmp_path):
    done = slurm("a.yaml", f"output_dir={tmp_path}", "checkpoint.resume=never", SLURM_RESTART_COUNT="2")
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all(line.endswith("checkpoint.resume=never checkpoint.resume=auto") for line in lines)


@pytest.mark.parametrize(
    ("state", "requeued"), [("preempted", True), ("finished", False), ("failed", False), (None, False)]
)
def test_slurm_requeues_preempted_runs_only(slurm, tmp_path, state, requeued):
    if state:
        (tmp_path / "status.json").write_text(f'{{\n "state": "{state}",\n "reason": "SIGUSR1"\n}}')
    done = slurm("a.yaml", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == "requeue 41234\n"
        assert "requeueing the job" in done.stdout


def test_slurm_does_not_requeue_failed_runs(slurm, tmp_path):
    (tmp_path / "status.json").write_text('{\n "state": "preempted"\n}')  # of the attempt before
    done = slurm("a.yaml", f"output_dir={tmp_path}", EXIT="3")
    assert done.returncode == 3
    assert not (tmp_path / "requeued").exists()


def test_slurm_requires_output_dir(slurm):
    done = slurm("a.yaml")
    assert done.returncode == 2
    assert "expected: sbatch scripts/launch/slurm.sbatch CONFIG output_dir=DIR" in done.stderr


def test_the_slurm_job_requests_a_warning_signal_and_requeueing():
    options = [
        line.split()[1] for line in (LAUNCH / "slurm.sbatch").read_text().splitlines() if "#SBATCH" in line
    ]
    assert {"--signal=USR1@120", "--requeue", "--open-mode=append"} <= set(options)
