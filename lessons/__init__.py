"""The lessons' own code: the checker that keeps prose and program together, the exercises, and the lab that lessons use."""
