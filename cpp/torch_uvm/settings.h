// How PyTorch comes to read its settings.
#pragma once

namespace torch_uvm {

// Has PyTorch parse its own keys in the environment, if it has not done so yet; throws for what is wrong with them.
// The patched PyTorch knows our keys and steps over them; from a stock one they are hidden meanwhile.
void parse_environment();

// Throws for what is wrong with our own options in the environment.
void check_options();

} // namespace torch_uvm
