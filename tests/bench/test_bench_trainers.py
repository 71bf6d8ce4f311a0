"""Cells that are trained by reinforcement and by preference: what is recorded, what is saved, what a killed run keeps."""



