"""What a trial is: fields, spec, overrides, sweep files, composing."""
