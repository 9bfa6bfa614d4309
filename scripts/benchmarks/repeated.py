"""Work of a known size: a session that is called several times."""

import numpy as np

import tfopt


class Repeated:
    """A session whose `run` calls another one so often."""

    def __init__(self, session: tfopt.Session, count: int) -> None:
        self._session, self._count = session, count

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the session and returns its last outputs."""
        for _ in range(self._count):
            outputs = self._session.run(inputs)
        return outputs
