"""`python -m benchmarks`: all topics."""

from benchmarks import accuracy, attention, calibration, compile, losses, mappings
from benchmarks.command import main

TOPICS = tuple(
    module.TOPIC for module in (mappings, losses, attention, calibration, compile, accuracy)
)

if __name__ == "__main__":
    main(TOPICS)
