"""Training and scoring with Lightning: the task, the data module and the command line behind ``tools/``."""
