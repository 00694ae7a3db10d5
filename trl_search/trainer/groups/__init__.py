"""The groups of a training batch: choice of questions, replacement, and carry-over to later batches.

question_choice.py   draws questions beyond those of TRL's sampler
question_order.py    keeps a resumed run at its place in the questions
pass_rates.py        how often each question was solved, for the curriculum
refill.py            replaces groups without a gradient while the batch runs
group_rewards.py     the rewards of one group, and whether they give a gradient
carry_over.py        continues unfinished trajectories in later batches
trajectory_pool.py   runs these trajectories on an event loop
"""
