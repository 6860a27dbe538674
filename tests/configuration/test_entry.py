"""The command line: what is wrong is one line that names it and what was meant, and the exit code is 2."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

import litdiffusion
from litdiffusion.configuration import config_folder, entry
from litdiffusion.system.processes import handling

Command = Callable[..., tuple[int, str, str]]

IN_THIS_PROCESS = "hydra/launcher=basic"
"""The jobs of a sweep; tests/sweeps has those of the default launcher."""


def test_runs_and_leaves_no_files(command: Command) -> None:
    code, out, err = command("experiment=small", "run_dir=here")
    assert (code, out, err) == (0, "here 7 cosine UNet\n", "")
    assert list(Path.cwd().iterdir()) == []


def test_default_run_folder_is_named_after_the_experiment(command: Command) -> None:
    _, out, _ = command("experiment=small")
    assert re.fullmatch(r"logs/small/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-[0-9a-f]{4} 7 cosine UNet\n", out)
    assert command()[1].startswith("logs/default/")


def test_overrides_may_stand_on_both_sides_of_an_option(command: Command) -> None:
    code, out, err = command(
        "experiment=small", IN_THIS_PROCESS, "-m", "seed=1,2", "run_dir=${hydra:job.num}"
    )
    assert (code, err) == (0, "")
    assert [line.split()[1] for line in out.splitlines() if line.endswith("UNet")] == ["1", "2"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["schedule=liner"], ["schedule=liner", "nearest: linear", "cosine, linear, quadratic"]),
        (["batch_size=64"], ["batch_size:", "nearest: datamodule.batch_size"]),
        (["schedul=linear"], ["schedul:", "nearest: schedule"]),
        (["net.dmi=3"], ["net.dmi", "nearest: net.dim"]),
        (["sampler=ddpm", "sampler.eta=1"], ["sampler.eta:", "for example: sampler=ddim sampler.eta=1"]),
        (
            ["schedule=cosine", "beta_start=1"],
            ["beta_start:", "nearest: schedule.beta_start (with schedule=linear)"],
        ),
        (["ddim=3"], ["ddim:", "nearest: sampler=ddim"]),
        (["timesteps=9"], ["timesteps:", "nearest: sampler.num_steps, schedule.num_steps\n"]),
        (["edit=none"], ["edit: no such key"]),
        (["hydra.run.dir=DIR"], ["hydra.run.dir=DIR:", "give run_dir=DIR"]),
        (["hydra.output_subdir=sub"], ["hydra.output_subdir=sub:", "run_dir"]),
        (["hydra.job.chdir=true"], ["hydra.job.chdir=true:", "run_dir"]),
        (["hydra.sweep.dir=DIR"], ["hydra.sweep.dir=DIR:", "add -m, or give run_dir=DIR"]),
        (["hydra.launcher.jobs=2"], ["hydra.launcher.jobs=2:", "add -m"]),
        (["-m", "hydra.sweeper.params.seed=1,2"], ["add it with +hydra.sweeper.params.seed=1,2"]),
        (["seed=1", "net.dmi=3", "schedule=cosine"], ["net.dmi", "nearest: net.dim"]),
        (["optimizer.amsgrad=true"], ["optimizer.amsgrad", "AdamW takes it", "+optimizer.amsgrad=true"]),
        (["+optimizer.amsgard=true"], ["optimizer.amsgard", "nearest: amsgrad"]),
        (["+seed=3"], ["seed: exists already", "seed=3"]),
        (["~net.foo"], ["net.foo", "no such key"]),
        (["~net"], ["net: needed here", "~net"]),
        (["net=null"], ["error: net=null: no such choice; there are: unet\n"]),
        (["experiment=smal"], ["experiment=smal", "nearest: small"]),
        (["experiment=wrong_choice"], ["schedule=liner", "file", "nearest: linear"]),
        (["experiment=not_yaml"], ["not_yaml.yaml, line 1"]),
        (["experiment=half_open"], ["seed: "]),
        (["schedule@other=cosine"], ["schedule@other", "+schedule@other=cosine"]),
        (["hydra.verbos=x"], ["hydra.verbos", "nearest: hydra.verbose"]),
        (["-m", "hydra/launcher=slurm"], ["hydra/launcher=slurm", "basic"]),
        (["nonsense=1"], ["nonsense", "--cfg job"]),
        (["seed"], ["seed:", "key=value"]),
        (["run_dir=my", "runs/a"], ["runs/a:", "run_dir='my runs/a', in make ARGS=\"run_dir='my runs/a'\""]),
        (["run_dir=it's"], ["run_dir=it's:", """'run_dir="it'"'"'s"'"""]),
        (["--seed", "3"], ["--seed", "key=value"]),
        (["run_dir=a (1)"], ["run_dir=a (1)", "'run_dir=\"a (1)\"'"]),
        (["seed=1,2"], ["seed=1,2", "-m"]),
        (["--config-name", "trein"], ["trein"]),
        (["--package", "net"], ["--package=net:", "--cfg job"]),
        (["--config-dir", "nowhere"], ["nowhere"]),
        (["--multirun", "--cfg", "job"], ["--multirun"]),
        (["net.dim=abc"], ["net.dim: 'abc' is not an int (UNet.dim)"]),
        (["seed=???"], ["seed: needs a value"]),
        (
            ["seed=${datamodule.batch_sise}"],
            ["seed:", "datamodule.batch_sise", "nearest: datamodule.batch_size"],
        ),
        (["seed=${oops:3}"], ["seed:", "oops"]),
        (["net.dim_mults=[1,2,3,x]"], ["net.dim_mults", "'x'"]),
        (["+net.groups=3"], ["net.groups=3", "1, 2, 4, 8"]),
        (["+net.dropout=3.0"], ["net.dropout=3.0"]),
        (["seed=1003"], ["seed: 1003 is unlucky; take another"]),
        (["-m", "schedule=linear,cosin"], ["schedule=cosin:", "nearest: cosine"]),
        (["-m", "sampler=ddim,ddpm", "sampler.eta=1"], ["for example: sampler=ddim sampler.eta=1"]),
        (["-m", "seed=1,2", "run_dir=here"], ["run_dir=here", "seed", "${hydra:job.num}"]),
        (["sweep=seeds", "run_dir=here"], ["run_dir=here", "sweep", "${hydra:job.num}"]),
        (["-m", "seed=1,2", "run_dir=a b=c"], ["run_dir=a b=c", "quote"]),
    ],
    ids=" ".join,
)
def test_mistakes_end_in_one_line(command: Command, arguments: list[str], named: list[str]) -> None:
    code, _, err = command(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1, err
    assert [words for words in named if words not in err] == [], err


def test_mistake_leaves_nothing_behind(command: Command) -> None:
    command("net.dim=abc")
    command("schedule=liner", "run_dir=here")
    command("hydra.run.dir=here")
    assert list(Path.cwd().iterdir()) == []


def test_extra_config_folder_is_searched_for_what_was_meant(command: Command, tmp_path: Path) -> None:
    mine = tmp_path / "mine/schedule"
    mine.mkdir(parents=True)
    (mine / "steep.yaml").write_text("{_target_: litdiffusion.diffusion.schedules.linear, num_steps: 60}")
    folder = f"--config-dir={mine.parent}"
    assert command(folder, "schedule=steep")[0] == 0
    assert "nearest: steep" in command(folder, "schedule=stepp")[2]


def test_bug_keeps_its_traceback(command: Command) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        command("seed=1001")


def test_interruption_is_quiet(command: Command) -> None:
    code, _, err = command("seed=1002")
    assert (code, err) == (130, "")


def test_a_ctrl_c_raises_nothing_before_the_task_begins(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OmegaConf could turn a KeyboardInterrupt into an error of its own, and the command would go on."""
    seen: list[object] = []

    def note(*args: object) -> None:
        seen.append(signal.getsignal(signal.SIGINT))

    compose = ConfigLoaderImpl.load_configuration
    monkeypatch.setattr(
        ConfigLoaderImpl, "load_configuration", lambda *args, **kwargs: note() or compose(*args, **kwargs)
    )
    monkeypatch.setattr("builtins.print", note)  # of the task
    with handling([signal.SIGINT], signal.SIG_DFL):
        assert command()[0] == 0
        note()
    assert list(dict.fromkeys(seen)) == [signal.SIG_DFL, signal.default_int_handler]
    assert seen[-1] is signal.SIG_DFL


def test_the_first_process_speaks_and_the_others_when_they_have_had_time_to_be_ended(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(entry.time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "0")
    code, _, said = command("net.dim=abc")
    assert (code, waited) == (2, [])
    monkeypatch.setenv("RANK", "3")
    assert command("net.dim=abc")[::2] == (2, said.replace("error:", "error (process 3):"))
    assert waited == [entry.OTHERS_WAIT_SECONDS]
    assert command("schedule=liner")[::2] == (2, "")  # they all have the same command line
    assert command("seed=1004")[::2] == (2, "")  # the cause was lost elsewhere
    assert waited == [entry.OTHERS_WAIT_SECONDS]


def test_traceback_on_request(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    code, _, err = command("+net.dropout=3.0")
    assert code == 2
    assert "litdiffusion/nn/unet.py" in err
    assert err.splitlines()[-1].startswith("error: net.dropout")


def test_environment_is_left_as_it_was(command: Command) -> None:
    command("net.dim=abc")
    assert "HYDRA_FULL_ERROR" not in os.environ


def test_sweep_goes_on_after_a_mistake_and_ends_with_2(command: Command) -> None:
    code, out, err = command("-m", "seed=1,1003,2", "schedule=linear", IN_THIS_PROCESS)
    assert code == 2
    assert err == "error: job 1 (seed=1003 schedule=linear): seed: 1003 is unlucky; take another\n"
    folders = re.findall(r"(logs/sweeps/\S+)/(\d) \d linear", out)
    assert [job for _, job in folders] == ["0", "2"]
    assert len({sweep for sweep, _ in folders}) == 1


def test_sweep_of_a_config_file_gives_each_job_its_folder(command: Command) -> None:
    code, out, err = command("sweep=seeds", IN_THIS_PROCESS)
    assert (code, err) == (0, "")
    assert len(set(re.findall(r"logs/sweeps/\S+/\d", out))) == 2


def test_sweep_may_name_its_folders(command: Command) -> None:
    code, out, err = command("-m", "seed=1,2", "run_dir=here/${hydra:job.num}", IN_THIS_PROCESS)
    assert code == 0, err
    assert re.findall(r"here/\d \d", out) == ["here/0 1", "here/1 2"]


def test_bug_in_a_sweep_keeps_its_traceback(command: Command) -> None:
    with pytest.raises(RuntimeError, match="a bug"):
        command("-m", "seed=1,1001", IN_THIS_PROCESS)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (
            ["--help"],
            f"\n  {'schedule=linear':27} how fast it falls\n{'cosine, linear, quadratic':>55}\n",
        ),
        (["--help"], "\n  seed=0\n  run_dir\n"),
        (["--cfg", "job"], "batch_size: 128"),
        (["--cfg", "job", "--resolve"], "run_dir: logs/default/"),
        (["--info", "searchpath"], "Config search path"),
        (["--version"], "Hydra"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_hydra_options_still_work(command: Command, arguments: list[str], shown: str) -> None:
    code, out, err = command(*arguments)
    assert (code, err) == (0, "")
    assert shown in out


def test_tab_completion(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "train.py schedule=")
    monkeypatch.setenv("COMP_POINT", "18")
    code, out, _ = command("-sc", "query=bash")
    assert code == 0
    assert {"schedule=linear", "schedule=cosine", "schedule=quadratic"} <= set(out.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_tab_completes_what_people_type_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(3)")
    line = f"{sys.executable} -m litdiffusion.sample -m ckpt=a sampler=ddp"
    script = (
        f"source {config_folder().parent}/scripts/completion.bash; COMP_LINE='{line}' COMP_WORDS=({line})"
    )
    found = subprocess.run(
        ["bash", "-c", f"{script} COMP_CWORD=5; _litdiffusion; echo ${{COMPREPLY[*]}}"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(litdiffusion.__file__).parents[1]}"},
        capture_output=True,
        text=True,
    )
    assert (found.stdout, found.stderr) == ("sampler=ddpm\n", "")


def test_the_package_finds_its_own_configuration() -> None:
    assert (config_folder() / "hydra/default.yaml").is_file()


SCRIPT = """
import os, sys, time
from pathlib import Path
from litdiffusion.configuration.checks import validate
from litdiffusion.configuration.entry import entry_point

@entry_point("train", Path(sys.argv.pop(1)))
def main(cfg):
    validate(cfg)
    if cfg.seed == 1:
        raise RuntimeError(f"a bug that knows {os.environ['DB_PASS']}")
    print("running", flush=True)
    time.sleep(60)

if __name__ == "__main__":
    main()
"""


def start(tree: Path, *arguments: str) -> "subprocess.Popen[str]":
    script = tree.parent / "train.py"
    script.write_text(SCRIPT)
    environment = os.environ | {
        "PYTHONPATH": str(Path(litdiffusion.__file__).parents[1]),
        "DB_PASS": "s3cr3t-pass",
    }
    return subprocess.Popen(
        [sys.executable, str(script), str(tree), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tree.parent,
        # A shell that starts the tests in the background has them ignore SIGINT, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_as_processes(tree: Path) -> None:
    """The same through a real interpreter: exit codes, stderr, and a real Ctrl-C."""
    mistaken, buggy, interrupted = start(tree, "net.dmi=3"), start(tree, "seed=1"), start(tree)
    assert interrupted.stdout is not None
    assert interrupted.stdout.readline() == "running\n"
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.communicate()[1] == ""
    assert interrupted.returncode == 130

    assert mistaken.communicate() == ("", "error: net.dmi: no such key; nearest: net.dim\n")
    assert mistaken.returncode == 2

    _, err = buggy.communicate()
    assert buggy.returncode == 1
    assert "Traceback" in err
    assert err.splitlines()[-1] == "RuntimeError: a bug that knows ***"


def test_ctrl_c_while_the_libraries_are_imported(tmp_path: Path) -> None:
    (tmp_path / "hydra.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "litdiffusion.train", "debug=tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -signal.SIGINT
