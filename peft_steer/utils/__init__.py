"""What every room needs and none owns: model sources, atomic files, user errors, YAML. It imports no other room."""
