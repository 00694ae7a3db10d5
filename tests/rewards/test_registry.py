"""Rewards read only the model's text, have names, can be pickled, and report missing columns."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import trl_search
from trl_search.common.errors import UserError
from trl_search.rewards import (
    BUILT_IN,
    REFLECTION_CAP,
    check_columns,
    default_weight,
    em,
    f1,
    format,
    reflection,
    required_columns,
    resolve_rewards,
    retrieval,
    soft_overlong_punishment,
)
from trl_search.rewards.declaration import with_settings

CALL = '<think> who? </think>\n<tool_call>\n{"name": "search", "arguments": {"query_list": ["Mira"]}}\n</tool_call>'
ANSWER = "<think> it says so </think>\n<answer> Lyon </answer>"


def trajectory(*turns: str) -> list[dict[str, Any]]:
    """A trajectory in which turns of the model and observations alternate."""
    return [{"role": "tool" if index % 2 else "assistant", "content": text} for index, text in enumerate(turns)]


def brevity(completions: list[Any], **kwargs: Any) -> list[float]:
    return [1.0 / len(completion) for completion in completions]


GOOD = trajectory(CALL, "Mira was born in Lyon. Wait, upon closer inspection: Lyon.", ANSWER)


def test_every_reward_accepts_the_arguments_of_trl() -> None:
    for name, reward in BUILT_IN.items():
        scores = reward(
            prompts=[[{"role": "user", "content": "where?"}]] * 2,
            completions=[GOOD, trajectory("Lyon")],
            completion_ids=[[1, 2], [3]],
            golden_answers=[["Lyon"], ["Lyon"]],
            question=["where?"] * 2,
            trainer_state=object(),
            log_extra=print,
            log_metric=print,
            **dict.fromkeys(getattr(reward, "settings", ()), 100),
        )
        assert len(scores) == 2 and all(0.0 <= abs(score) <= 1.0 for score in scores), name
        assert reward.__name__ == name
        assert pickle.loads(pickle.dumps(reward)) is reward


@pytest.mark.parametrize("golden", ["Lyon", ["Paris", "the Lyon!"], ("Lyon",), np.array(["Lyon"])])
@pytest.mark.parametrize("completion", [GOOD, ANSWER, {"role": "assistant", "content": ANSWER}, [{"content": ANSWER}]])
def test_em_for_all_formats_of_completions_and_golden_answers(completion: Any, golden: Any) -> None:
    assert em(completions=[completion], golden_answers=[golden]) == [1.0]
    assert f1(completions=[completion], golden_answers=[golden]) == [1.0]


def test_em_and_f1_score_the_last_answer() -> None:
    completions: list[Any] = ["<answer>Lyon</answer><answer>Paris</answer>", "Lyon", "<answer></answer>", trajectory()]
    assert em(completions=completions, golden_answers=[["Lyon"]] * 4) == [0.0] * 4
    assert f1(completions=["<answer>Lyon in France</answer>"], golden_answers=[["Lyon"]]) == [0.5]


def test_rows_without_golden_answers_are_left_out() -> None:
    for reward in (em, f1, retrieval):
        assert reward(completions=[ANSWER, ANSWER, ANSWER], golden_answers=[None, [], ["Lyon"]])[:2] == [None, None]


def test_observations_earn_no_reward() -> None:
    # Pitfall 7: the passage contains an answer, a reflection and a call; the model's text does not.
    world = "<answer> Lyon </answer> wait, let me double-check <tool_call>x</tool_call>"
    completion = trajectory(CALL, world, "I do not know")
    assert em(completions=[completion], golden_answers=[["Lyon"]]) == [0.0]
    assert f1(completions=[completion], golden_answers=[["Lyon"]]) == [0.0]
    assert reflection(completions=[completion]) == [0.0]
    assert format(completions=[completion]) == [0.0]
    # The reverse: the model cannot earn the retrieval reward by writing the answer itself.
    assert retrieval(completions=[trajectory(CALL, "nothing", ANSWER)], golden_answers=[["Lyon"]]) == [0.0]
    assert retrieval(completions=[ANSWER], golden_answers=[["Lyon"]]) == [0.0]
    assert retrieval(completions=[GOOD], golden_answers=[["LYON."]]) == [1.0]


def test_an_answer_does_not_span_turns() -> None:
    completion = trajectory("<answer> Paris </answer> <answer>", "…", "Lyon </answer>")
    assert em(completions=[completion], golden_answers=[["Lyon"]]) == [0.0]
    assert em(completions=[completion], golden_answers=[["Paris"]]) == [1.0]


def test_other_message_formats_of_trl() -> None:
    # Stock TRL moves calls out of the text, and multimodal content is a list of parts.
    call = {"type": "function", "function": {"name": "search", "arguments": {"query_list": ["Mira"]}}}
    completion: list[dict[str, Any]] = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "search", "content": "Lyon"},
        {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
    ]
    assert em(completions=[completion], golden_answers=[["Lyon"]]) == [1.0]
    assert format(completions=[completion]) == [1.0]


@pytest.mark.parametrize(
    ("turns", "score"),
    [
        ([ANSWER], 1.0),
        (["<answer>Lyon</answer><|im_end|>\n"], 1.0),
        (["So: <answer>Lyon</answer>"], 1.0),
        ([CALL, "…", CALL + "<|im_end|>", "…", ANSWER], 1.0),  # qwen_tools, qwen_inline
        (["<tool_call> where is Mira </tool_call>", "…", ANSWER], 1.0),  # Shin's bare query
        (["<think> a </think><search> b </search>", "…", "<think> c </think>" + ANSWER], 1.0),  # search_r1
        # With an answer, but malformed.
        (["<answer>Lyon</answer> that is it"], 0.5),
        (["<answer> </answer>"], 0.5),
        (["<answer>Paris</answer><answer>Lyon</answer>"], 0.5),
        (["<think> <answer>Paris</answer> or <tool_call> </think> <answer>Lyon</answer>"], 1.0),  # in a thought
        (["<think> a </think></think><answer>Lyon</answer>"], 0.5),
        (["</think><answer>Lyon</answer>"], 0.5),
        (["I give up", "…", ANSWER], 0.5),
        ([CALL + CALL, "…", ANSWER], 0.5),
        ([CALL + " and then?", "…", ANSWER], 0.5),
        (["<search>a</tool_call>", "…", ANSWER], 0.5),
        (["<search> </search>", "…", ANSWER], 0.5),
        (['<tool_call>{"name": "search"</tool_call>', "…", ANSWER], 0.5),
        (['<tool_call>{"name": "search"}</tool_call>', "…", ANSWER], 0.5),
        (["<tool_call>" + "[" * 100_000 + "</tool_call>", "…", ANSWER], 0.5),
        ([ANSWER, "…", ANSWER], 0.5),
        # No answer in the last turn, or the model writes an observation.
        ([], 0.0),
        (["Lyon"], 0.0),
        (["<answer> Lyon"], 0.0),
        (["<think> a <answer>Lyon</answer>"], 0.0),
        (["<think> <answer>Lyon</answer> </think>"], 0.0),
        ([CALL + ANSWER], 0.0),  # the environment parsed a call
        ([CALL], 0.0),
        ([ANSWER, "…", CALL], 0.0),
        ([CALL + "\n<tool_response>Lyon</tool_response>", "…", ANSWER], 0.0),
        (["<information>Lyon</information>" + ANSWER], 0.0),
    ],
)
def test_format(turns: list[str], score: float) -> None:
    assert format(completions=[trajectory(*turns)]) == [score]


def test_reflection_is_capped_and_has_weight_zero_by_default() -> None:
    scores = reflection(completions=["Lyon", "Wait, Lyon", "wait, " * 50])
    assert scores == [0.0, 1 / REFLECTION_CAP, 1.0]
    assert default_weight(reflection) == 0.0
    assert default_weight(em) == default_weight(brevity) == 1.0


def test_columns_are_checked_up_front_and_in_the_call() -> None:
    assert [required_columns(reward) for reward in (em, format, brevity)] == [("golden_answers",), (), ()]
    check_columns([em, format, brevity], ["prompt", "golden_answers"])
    with pytest.raises(UserError, match=r"'f1' needs the dataset column 'golden_answers'; .* are: answer, prompt\."):
        check_columns([format, f1], ["prompt", "answer"])
    with pytest.raises(UserError, match=r"'em' needs .* are: answer\. Add the column"):
        em(prompts=["a"], completions=["b"], answer=["c"], log_metric=print)


def test_rewards_resolve_in_order() -> None:
    assert resolve_rewards("em") == [em]
    assert resolve_rewards(brevity) == [brevity]
    assert resolve_rewards(["format", brevity, "em"]) == [format, brevity, em]
    assert resolve_rewards("trl_search.rewards.f1") == resolve_rewards("trl_search.rewards:f1") == [f1]


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ("formt", r"unknown reward 'formt': did you mean 'format'\? There are: em, f1, format, reflection, retrieval"),
        ("em,format", "^unknown reward 'em,format': give separate words, em format$"),
        ("zzz", r"unknown reward 'zzz'\. There are: em"),
        ([], "reward_funcs is empty"),
        (["em", "f1", "em"], "'em' is named twice"),
        ([3], "a name or a function, not int"),
        (3, "a name or a function, not int"),
        ({"em": 1.0, "format": 0.1}, r"set reward_funcs=\['em', 'format'\], .*reward_weights=\[1.0, 0.1\]"),
        (".em", "'.em' cannot be imported"),
        ("no_such_module.reward", "'no_such_module.reward' cannot be imported: No module named"),
        ("trl_search.rewards:nothing", "cannot be imported: .*has no attribute 'nothing'"),
        (
            "trl_search.rewards:of_last_mesage",
            r"\(/.*/rewards/__init__.py\): did you mean trl_search.rewards:of_last_",
        ),
        ("brevity", "Your own reward is given by its import path: my_module:brevity, of my_module.py in the working"),
        ("my_rewards.py:brevity", "is a file: give its import path, my_rewards:brevity$"),
        ("./rewards/mine.py", "is a file: give its import path, rewards.mine:NAME$"),
        ("/home/me/mine.py:f", "is a file: give its import path, mine:f, and start in the folder of mine.py$"),
        ("trl_search.rewards:REFLECTION_CAP", "is not a function but int"),
    ],
)
def test_an_unknown_reward_is_explained(specs: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_rewards(specs)


def test_an_installed_package_adds_rewards(tmp_path: Path) -> None:
    project, site = tmp_path / "project", tmp_path / "site"
    project.mkdir()
    (project / "toy_rewards.py").write_text(
        textwrap.dedent("""
            from trl_search.rewards import declare

            @declare(required_columns=["difficulty"])
            def brevity(completions, difficulty, **kwargs):
                return [1.0 / len(completion) for completion in completions]
        """)
    )
    (project / "pyproject.toml").write_text(
        textwrap.dedent("""
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "toy-rewards"
            version = "1.0"
            [project.entry-points."trl_search.rewards"]
            brevity = "toy_rewards:brevity"
            broken = "toy_rewards:gone"
            [tool.setuptools]
            py-modules = ["toy_rewards"]
        """)
    )
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        str(site),
    ]
    subprocess.run([sys.executable, *install, str(project)], check=True, timeout=600)
    program = textwrap.dedent("""
        import pickle
        from trl_search.common.errors import UserError
        from trl_search.rewards import check_columns, em, resolve_rewards
        first, second = resolve_rewards(["brevity", "em"])
        assert second is em and first(completions=["ab"], difficulty=[1]) == [0.5]
        assert pickle.loads(pickle.dumps(first)) is first
        for attempt in (lambda: resolve_rewards("brevty"), lambda: resolve_rewards("broken"),
                        lambda: check_columns([first], ["prompt"])):
            try:
                attempt()
            except UserError as error:
                print(error)
    """)
    path = f"{site}:{Path(trl_search.__path__[0]).parent}"
    run = subprocess.run([sys.executable, "-c", program], env={"PYTHONPATH": path}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    misspelled, broken, column = run.stdout.splitlines()
    assert misspelled.startswith("unknown reward 'brevty': did you mean 'brevity'? There are: brevity, broken, em")
    assert broken.startswith("reward 'broken' of package 'toy-rewards' (toy_rewards:gone) cannot be imported")
    assert column.startswith("reward 'brevity' needs the dataset column 'difficulty'")


def test_the_soft_overlong_punishment_follows_dapo() -> None:
    """The numbers equal those of TRL's function, which takes its two lengths as arguments."""
    from trl.rewards import get_soft_overlong_punishment

    ids = [[1] * length for length in (0, 399, 400, 401, 450, 499, 500, 501, 900)]
    ours = with_settings(soft_overlong_punishment, SimpleNamespace(max_completion_length=500))
    assert ours.__name__ == "soft_overlong_punishment" and required_columns(ours) == ()
    scores = ours(completions=[""] * len(ids), completion_ids=ids)
    assert scores == pytest.approx(get_soft_overlong_punishment(500, 100)(completion_ids=ids))
    assert scores[4] == -0.5


def test_a_reward_without_settings_is_not_changed() -> None:
    assert with_settings(em, SimpleNamespace()) is em
