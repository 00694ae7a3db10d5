"""Which groups a training batch is made of: their questions, what replaces them, and those that outlive the batch.

question_choice.py   the questions that a batch asks beyond those of TRL's sampler
pass_rates.py        how often each question was solved, for the curriculum
refill.py            groups without a gradient are replaced while the batch runs
group_rewards.py     the rewards of one group, and whether they give a gradient
carry_over.py        unfinished trajectories go on in later batches
trajectory_pool.py   the event loop on which they go on
"""
