"""What a person types: commands, processes, exit codes. Imports no torch; the work is in hvtrain."""
