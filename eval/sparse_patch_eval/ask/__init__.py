"""One prompt, one prefill: what the model says, what its layers were given, what a plan keeps."""
