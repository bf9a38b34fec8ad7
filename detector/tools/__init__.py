"""The command lines: a module for each tool, whose ``main`` reads the flags first and then imports what does the work.

The flags of ``eval``, ``predict``, ``export`` and ``check`` are read by argparse (``arguments`` has what they share);
``evaluating``, ``predicting``, ``exporting`` and ``checking`` do the work. ``train`` and ``browse`` are Lightning's.
"""
