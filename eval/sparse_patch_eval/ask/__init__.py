"""One prompt, one prefill: answers of the model, inputs of its layers, quality of plans."""
