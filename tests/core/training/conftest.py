import pytest
import small_job


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A small checkpoint and five cached clips of two sizes."""
    return small_job.make(tmp_path_factory.mktemp("training"))
