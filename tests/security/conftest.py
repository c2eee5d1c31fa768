"""What the boundaries' tests share."""

from tests.demo.conftest import address, served

__all__ = ["address", "served"]
