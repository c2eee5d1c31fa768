"""What every call does to its thread and to memory: states put back, arithmetic set, chunks that fit."""
