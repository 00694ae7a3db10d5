"""Evaluation: `evaluate.py` evaluates one set of questions, `run.py` implements `trl-search eval`.

evaluate.py ── outcomes.py    one outcome per question, and their means with intervals
run.py ── sets.py             the questions
       ├─ backends.py         the policy
       ├─ settings.py         the settings that define the result and may not change in a folder
       ├─ answers_file.py     one line per finished question, so that a killed evaluation resumes
       └─ table.py ── published_scores.py
"""
