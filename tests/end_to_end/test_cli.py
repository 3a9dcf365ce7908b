"""The command as a person meets it: the seed's command lines, mistakes, corners."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import COMMAND
from tests.support.server import ModelServer, completion

REPO = Path(__file__).parents[2]
INFER = [COMMAND[0].replace("fabe-ds", "fabe-infer")]


def seed_folder(box):
    """The files that the seed's command lines name."""
    for name in (
        "path/to/data.jsonl",
        "path/to/dir/a.jsonl",
        "path/to/dir/b.jsonl",
        "dataset.jsonl",
        "data/data.jsonl",
        "large_dataset.jsonl",
    ):
        box.lines(name, [{"code": f"{name} {i}"} for i in range(3)])
    template = (REPO / "configs/prompts/refactor_python.j2").read_text()
    for name in ("examples/prompts/refactor_python.j2", "prompts/refactor.j2"):
        box.write(name, template)


def test_the_seeds_echo_line(box):
    seed_folder(box)
    ended = box.fabe(
        "run",
        "--input",
        "path/to/data.jsonl",
        "--field",
        "code",
        "--instruction",
        "请重构代码以提高可读性。",
        "--provider",
        "echo",
        "--model",
        "local",
    )
    assert ended.code == 0, ended
    assert box.read("outputs/data.jsonl")[0] == {
        "code": "# echo: local\npath/to/data.jsonl 0",
        "original_code": "path/to/data.jsonl 0",
    }


def test_the_seeds_ollama_line(box):
    seed_folder(box)
    with ModelServer() as server:
        server.models = ["deepseek-coder:6.7b"]
        ended = box.fabe(
            "run",
            "--input",
            "path/to/dir",
            "--glob",
            "*.jsonl",
            "--field",
            "code",
            "--instruction",
            "examples/prompts/refactor_python.j2",
            "--provider",
            "ollama",
            "--model",
            "deepseek-coder:6.7b",
            "--output",
            "outputs/",
            "--concurrency",
            4,
            "--batch-size",
            8,
            "--base-url",
            server.root,
        )
        assert ended.code == 0, ended
        assert sorted(p.name for p in (box.path / "outputs").iterdir()) == ["a.jsonl", "b.jsonl"]
        sources = [prompt.rsplit("\n\n", 1)[1] for prompt in sorted(server.prompts)]
        assert sources == [f"path/to/dir/{n}.jsonl {i}" for n in "ab" for i in range(3)]
        assert server.most_in_flight <= 4


def test_the_seeds_modelscope_lines(box, talkative):
    seed_folder(box)
    common = [
        "--field",
        "code",
        "--instruction",
        "prompts/refactor.j2",
        "--provider",
        "modelscope",
        "--model",
        talkative,
        "--on-truncated",
        "keep",
        "--no-strip-fences",
    ]
    ended = box.fabe(
        "run",
        "--input",
        "dataset.jsonl",
        *common,
        "--batch-size",
        16,
        "--concurrency",
        4,
        "--device",
        "cpu",
        "--max-new-tokens",
        4,
    )
    assert ended.code == 0, ended
    ended = box.fabe(
        "run",
        "--input",
        "large_dataset.jsonl",
        *common,
        "--batch-size",
        16,
        "--concurrency",
        2,
        "--device",
        "cpu",
        "--max-new-tokens",
        5,
        "--cache-dir",
        ".cache_large",
        "--resume",
    )
    assert ended.code == 0, ended
    assert (box.path / ".cache_large/records.sqlite").exists()


def test_the_seeds_yaml_file(box, talkative):
    seed_folder(box)
    box.write(
        "examples/config.yaml",
        f"""
provider: modelscope
model: {talkative}
input_path: ../data
input_glob: "*.jsonl"
field: code
output_path: ./outputs
instruction: ./prompts/refactor_python.j2
template_vars:
  language: python
  goal: improve readability and remove dead code

concurrency: 4
batch_size: 16
retry: 3
cache_dir: .cache
resume: true
strip_fences: true
auto_extract_code: true
""",
    )
    command = [
        *INFER,
        "run",
        "--config",
        "examples/config.yaml",
        "--max-new-tokens",
        "4",
        "--on-truncated",
        "keep",
        "--no-strip-fences",
    ]
    ended = subprocess.run(
        command, cwd=box.path, env=box.environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert len((box.path / "examples/outputs/data.jsonl").read_text().splitlines()) == 3
    assert (box.path / "examples/.cache").is_dir()


def test_the_shell_script_takes_the_seeds_short_options(box, talkative):
    box.lines("dataset.jsonl", [{"code": "x = 1"}])
    script = REPO / "scripts/run_infer.sh"
    command = [
        "bash",
        str(script),
        "-m",
        str(talkative),
        "-i",
        "dataset.jsonl",
        "-o",
        "out",
        "-d",
        "cpu",
        "-P",
        "modelscope",
        "-S",
        "16",
        "-C",
        "4",
        "-n",
        "4",
        "-t",
        "0.1",
    ]
    environment = {**box.environment, "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    ended = subprocess.run(
        [*command, "--", "--on-truncated", "keep", "--no-strip-fences"],
        cwd=box.path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    assert len((box.path / "out/dataset.jsonl").read_text().splitlines()) == 1


MISTAKES = {
    "no input": ([], "--input is required"),
    "missing file": (["--input", "nothing.jsonl"], "--input nothing.jsonl: no such file"),
    "wrong kind of file": (["--input", "x.txt"], "--input x.txt: not a .json"),
    "nothing matches": (["--input", "folder", "--glob", "*.nope"], "no file matches --glob *.nope"),
    "no instruction": (
        ["--input", "d.jsonl", "--provider", "openai", "--model", "m"],
        "--instruction is required",
    ),
    "no model": (
        ["--input", "d.jsonl", "--provider", "openai", "--instruction", "x"],
        "--model is required",
    ),
    "unknown provider": (
        ["--input", "d.jsonl", "--provider", "opnai", "--instruction", "x"],
        "did you mean openai?",
    ),
    "unknown flag": (["--inptu", "d.jsonl"], "--inptu"),
    "not a number": (["--input", "d.jsonl", "--concurrency", "many"], "--concurrency"),
    "too small": (["--input", "d.jsonl", "--batch-size", "0"], "--batch-size 0"),
    "device": (["--input", "d.jsonl", "--device", "tpu"], "--device tpu: write cpu"),
    "template var": (
        ["--input", "d.jsonl", "--template-var", "x"],
        "--template-var x: write name=",
    ),
    "template file": (["--input", "d.jsonl", "--instruction", "no.j2"], "--instruction no.j2"),
    "undefined variable": (
        ["--input", "d.jsonl", "--instruction", "{{ goal }}"],
        "instruction:1: 'goal' is undefined",
    ),
    "both outputs": (["--input", "d.jsonl", "--inplace", "--output", "o"], "do not go together"),
    "same file": (["--input", "d.jsonl", "--output", "."], "would replace the input"),
    "output is a file": (
        ["--input", "d.jsonl", "--output", "x.txt"],
        "--output x.txt: not a folder",
    ),
    "field": (["--input", "d.jsonl", "--field", "a..b"], "--field: field path 'a..b'"),
    "backup": (["--input", "d.jsonl", "--backup-field", "code"], "it is the target field itself"),
    "aliases": (
        ["--input", "d.jsonl", "--strip-fences", "--no-auto-extract-code"],
        "are one setting",
    ),
    "no config": (["--config", "no.yaml"], "--config no.yaml: No such file"),
    "config key": (
        ["--config", "typo.yaml"],
        "unknown setting 'provder'; did you mean 'provider'?",
    ),
    "config value": (["--config", "value.yaml"], "value.yaml: retry"),
    "config syntax": (["--config", "syntax.yaml"], "--config syntax.yaml:2:"),
    "broken input": (["--input", "broken.jsonl"], "broken.jsonl:2:"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(box, name):
    box.lines("d.jsonl", [{"code": "x"}])
    box.lines("folder/d.jsonl", [{"code": "x"}])
    box.write("x.txt", "text")
    box.write("typo.yaml", "provder: echo\n")
    box.write("value.yaml", "retry: often\n")
    box.write("syntax.yaml", "a: b\n c: d\n")
    box.write("broken.jsonl", '{"code": "x"}\n{"code": \n')
    flags, says = MISTAKES[name]
    ended = box.fabe("run", *flags)
    assert ended.code == 2, ended
    assert says in ended.err
    assert ended.err.count("\n") == 1
    assert not (box.path / "outputs").exists()


def test_nothing_to_do_is_no_failure(box):
    box.write("in/empty.json", "[]\n")
    box.write("in/nothing.jsonl", "")
    box.write("in/blank.jsonl", "\n\n")
    ended = box.fabe("run", "--input", "in")
    assert ended.code == 0, ended
    assert "0 records" in ended.out
    assert {p.name: p.read_text() for p in (box.path / "outputs").iterdir()} == {
        "empty.json": "[]\n",
        "nothing.jsonl": "",
        "blank.jsonl": "\n\n",
    }


def test_records_without_a_usable_field_are_skipped_and_counted(box):
    text = '{"code": ""}\n{"code": null}\n{"a": 1}\n{"code": 5}\n{"code": "x"}\n[]\n'
    box.write("d.jsonl", text)
    ended = box.fabe("run", "--input", "d.jsonl")
    assert ended.code == 0
    assert "5 skipped (1 empty, 2 missing, 1 not a string, 1 null)" in ended.out
    written = (box.path / "outputs/d.jsonl").read_text().split("\n")
    assert written[:4] + written[5:] == text.split("\n")[:4] + text.split("\n")[5:]


def test_a_broken_file_can_be_left_out(box):
    box.lines("in/good.jsonl", [{"code": "x"}])
    box.write("in/bad.json", '[{"code": "x"}, {"code')
    assert box.fabe("run", "--input", "in").code == 2
    ended = box.fabe("run", "--input", "in", "--on-bad-input", "skip")
    assert ended.code == 1
    assert "bad.json:1:" in ended.err
    assert [p.name for p in (box.path / "outputs").iterdir()] == ["good.jsonl"]
    assert box.report()["bad_files"]
    again = box.fabe("run", "--input", "in", "--on-bad-input", "skip")
    assert again.code == 1


def test_the_output_is_not_taken_for_input(box):
    box.lines("in/a.jsonl", [{"code": "x"}])
    for _ in range(2):
        ended = box.fabe("run", "--input", "in", "--output", "in/out")
        assert ended.code == 0
        assert "1 records" in ended.out


@pytest.mark.parametrize("language", ["python", "javascript", "sql", "html", "css", "unheard-of"])
def test_echo_puts_a_comment_of_the_language_on_top(box, language):
    box.lines("d.jsonl", [{"code": "x"}])
    box.fabe("run", "--input", "d.jsonl", "--template-var", f"language={language}")
    assert (
        box.read("outputs/d.jsonl")[0]["code"]
        == {
            "python": "# echo: local\nx",
            "javascript": "// echo: local\nx",
            "sql": "-- echo: local\nx",
            "html": "<!-- echo: local -->\nx",
            "css": "/* echo: local */\nx",
            "unheard-of": "# echo: local\nx",
        }[language]
    )


@pytest.mark.parametrize(
    ("flags", "yaml", "environment", "expected"),
    [
        ([], "", {}, 128),
        ([], "max_new_tokens: 5\n", {}, 5),
        ([], "max_new_tokens: 5\n", {"MAX_NEW_TOKENS": "6"}, 6),
        (["--max-new-tokens", "7"], "max_new_tokens: 5\n", {"MAX_NEW_TOKENS": "6"}, 7),
    ],
)
def test_flag_over_environment_over_file_over_default(box, flags, yaml, environment, expected):
    box.lines("d.jsonl", [{"code": "x"}])
    box.write("c.yaml", f"input_path: d.jsonl\nprovider: ollama\nmodel: m\ninstruction: Up\n{yaml}")
    ended = box.fabe("run", "--config", "c.yaml", "--dry-run", *flags, **environment)
    assert f'"num_predict": {expected}' in ended.out, ended


@pytest.mark.parametrize(
    ("flags", "resume"),
    [
        ([], True),
        (["--resume"], True),
        (["--no-resume"], False),
        (["--resume", "false"], False),
        (["--resume=false"], False),
        (["--resume", "1"], True),
        (["--no-resume", "--retry", "1"], False),
    ],
)
def test_switches_take_a_value_or_none(box, flags, resume):
    box.lines("d.jsonl", [{"code": "x"}])
    assert box.fabe("run", "--input", "d.jsonl", *flags).code == 0
    assert box.report()["config"]["resume"] is resume


def test_the_environment_asks_for_a_dry_run(box):
    box.lines("d.jsonl", [{"code": "x"}])
    ended = box.fabe("run", "--input", "d.jsonl", DRY_RUN="1")
    assert "dry run: 1 records, 1 to do" in ended.out


def test_a_dry_run_sends_and_writes_nothing(box, server):
    box.lines("d.jsonl", [{"code": f"x = {i}"} for i in range(9)] + [{"code": ""}, {}])
    command = [
        "run",
        "--input",
        "d.jsonl",
        "--instruction",
        "Up",
        "--provider",
        "openai",
        "--model",
        "m",
        "--base-url",
        server.url,
    ]
    ended = box.fabe(*command, "--dry-run")
    assert ended.code == 0
    assert ended.out.count("POST") == 3
    assert '"content": "Up\\n\\nx = 2"' in ended.out
    assert "11 records, 9 to do; 2 skipped (1 empty, 1 missing)" in ended.out
    assert not server.calls
    assert sorted(p.name for p in box.path.iterdir()) == ["d.jsonl"]
    box.fabe(*command)
    assert "9 to do, of them 9 answered already" in box.fabe(*command, "--dry-run").out


def test_lines_of_progress_where_there_is_no_terminal(box):
    async def slow(call):
        import asyncio

        await asyncio.sleep(0.9)
        return completion(call, "x")

    with ModelServer(slow) as server:
        box.lines("d.jsonl", [{"code": f"{i}"} for i in range(8)])
        ended = box.fabe(
            "run",
            "--input",
            "d.jsonl",
            "--instruction",
            "Up",
            "--provider",
            "openai",
            "--model",
            "m",
            "--base-url",
            server.url,
            "--concurrency",
            1,
        )
    assert "records/s" in ended.err
    assert "left" in ended.err


def test_providers_are_listed_with_what_they_need(box):
    ended = box.fabe("providers")
    assert ended.code == 0
    for name in ("echo", "openai", "ollama", "hf", "modelscope"):
        assert name in ended.out


def test_help_loads_nothing_heavy():
    heavy = {"torch", "datasets", "aiohttp", "pyarrow", "transformers", "ray"}
    code = f"import sys, fabe_ds.cli.main; print(sorted({heavy} & set(sys.modules)))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


def test_dotted_fields_and_several_globs(box):
    box.lines(
        "in/a.jsonl",
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}],
    )
    box.write("in/sub/b.json", json.dumps({"messages": [{"content": "z"}]}, indent=1))
    ended = box.fabe(
        "run",
        "--input",
        "in",
        "--glob",
        "*.jsonl",
        "--glob",
        "**/*.json",
        "--field",
        "messages.-1.content",
        "--backup-field",
        "was",
    )
    assert ended.code == 0, ended
    assert box.read("outputs/a.jsonl")[0]["messages"][1] == {
        "role": "assistant",
        "content": "# echo: local\na",
        "was": "a",
    }
    assert (
        '\n   "content": "# echo: local\\nz",\n   "was": "z"\n'
        in (box.path / "outputs/sub/b.json").read_text()
    )


def test_help_groups_the_flags(box):
    ended = box.fabe("run", "--help", COLUMNS="120")
    assert ended.code == 0
    titles = re.findall(r"^╭─ ([A-Z][\w ]+) ─", ended.out, re.MULTILINE)
    groups = ["Input and output", "Prompt", "Model", "Execution", "Ray", "Hub"]
    assert titles == ["Options", *groups]
    text = " ".join(ended.out.replace("│", " ").split())
    assert "vllm needs fabe-ds[vllm]. [default: transformers]" in text
    assert "[default: outputs]" in text
    assert "[default: 128] [env: MAX_NEW_TOKENS]" in text


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("fabe-ds pre", ["preview"]),
        ("fabe-ds docs ser", ["servers"]),
        ("fabe-ds cache ex", ["export", "explain"]),
        ("fabe-ds run --on-tr", ["--on-truncated"]),
        ("fabe-ds run --on-truncated ", ["fail", "keep"]),
        ("fabe-ds run --provider o", ["openai", "ollama"]),
        ("fabe-ds run --input ", []),  # the shell offers files
    ],
)
def test_the_shell_completes(box, words, offered):
    asked = {"_FABE_DS_COMPLETE": "complete_bash", "COMP_WORDS": words}
    ended = box.fabe(**asked, COMP_CWORD=str(words.count(" ")))
    assert sorted(ended.out.split()) == sorted(offered)
    assert "_FABE_DS_COMPLETE=complete_bash" in box.fabe("--show-completion", "bash").out


def test_version_and_help_by_their_usual_names(box):
    import subprocess
    import sys

    version = box.fabe("version").out
    assert box.fabe("--version").out == version
    module = subprocess.run(
        [sys.executable, "-m", "fabe_ds", "--version"], capture_output=True, text=True, check=True
    )
    assert module.stdout == version
    assert box.fabe("run", "-h").out == box.fabe("run", "--help").out


def test_the_package_lists_what_it_offers():
    import fabe_ds

    assert {"run", "transform_fn", "load_records", "RunConfig"} <= set(dir(fabe_ds))
