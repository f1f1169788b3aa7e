from diptych.machine import share_cores

share_cores()  # before a recipe imports torch
