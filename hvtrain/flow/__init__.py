"""Flow-matching mathematics: noise levels, loss, sigma schedules, solvers. sigma in [0, 1]: x =
(1 - sigma) x0 + sigma eps."""
