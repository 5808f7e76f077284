"""What the tasks share and core itself does not need: commands, run folders, recipes, studies, plots, downloads."""
