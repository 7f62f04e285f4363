"""Training: the job description (`job.py`), its folder (`run.py`), the loop (`loop.py`) and the process (`worker.py`).

What a step is made of: `batches.py`, `timesteps.py`, `loss.py`, `optimizers.py`, `schedules.py`; what is kept: `state.py`,
`metadata.py`; a picture of the timesteps: `chart.py`.
"""
