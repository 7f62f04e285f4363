"""Training: the job description (`job.py`), its folder (`run.py`), the loop (`loop.py`) and the process (`worker.py`)."""
