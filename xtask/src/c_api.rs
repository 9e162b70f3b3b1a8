//! The functions of `cpp/torch_uvm/c_api.h`, which a library with the allocator inside must offer to Python.

use std::fs;

use anyhow::{Context, Result, ensure};

use crate::elf::Library;
use crate::paths::{self, shown};

/// Which libraries have a function.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Home {
    /// A patched libc10_cuda.so and the plug-in.
    Both,
    PlugIn,
}

/// What every function's name begins with.
pub const PREFIX: &str = "torch_uvm_";
/// From here on the header declares what only the plug-in has.
const PLUG_IN_ONLY: &str = "// Only in the plug-in.";

/// An error that names each function that the library should export and does not.
pub fn check(library: &Library, home: Home) -> Result<()> {
    let header = paths::root().join("cpp/torch_uvm/c_api.h");
    let text = fs::read_to_string(&header).with_context(|| format!("cannot read {}", shown(&header)))?;
    let functions = functions(&text);
    ensure!(!functions.is_empty(), "{} declares no function", shown(&header));
    let wanted = functions.iter().filter(|(_, declared)| home == Home::PlugIn || *declared == Home::Both);
    let missing: Vec<_> =
        wanted.map(|(name, _)| name.as_str()).filter(|name| !library.exports.contains_key(*name)).collect();
    ensure!(missing.is_empty(), "it lacks functions of {}: {}", shown(&header), missing.join(", "));
    Ok(())
}

fn functions(header: &str) -> Vec<(String, Home)> {
    let mut home = Home::Both;
    let mut functions = Vec::new();
    for line in header.lines() {
        if line.trim() == PLUG_IN_ONLY {
            home = Home::PlugIn;
        }
        let declared = line.strip_prefix("TORCH_UVM_API ").and_then(|rest| rest.split_once('('));
        let Some((before, _)) = declared else { continue };
        let name = before.rsplit([' ', '*', '&']).next().unwrap_or_default();
        functions.push((name.to_owned(), home));
    }
    functions
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn functions_are_found_with_their_home() {
        let header = "#define TORCH_UVM_API extern \"C\"\nTORCH_UVM_API int torch_uvm_a();\n\
                      TORCH_UVM_API const char* torch_uvm_b(int a);\n\n// Only in the plug-in.\n\n\
                      TORCH_UVM_API const char *torch_uvm_c(\n  int a);\n";
        let expected = [("torch_uvm_a", Home::Both), ("torch_uvm_b", Home::Both), ("torch_uvm_c", Home::PlugIn)];
        assert_eq!(functions(header), expected.map(|(name, home)| (name.to_owned(), home)));
    }

    #[test]
    fn missing_functions_are_named() {
        let mut library = Library::default();
        let error = check(&library, Home::PlugIn).unwrap_err().to_string();
        assert!(error.contains("torch_uvm_activate") && error.contains("torch_uvm_rows"), "{error}");
        let header = fs::read_to_string(paths::root().join("cpp/torch_uvm/c_api.h")).unwrap();
        let both: Vec<_> = functions(&header).into_iter().filter(|(_, home)| *home == Home::Both).collect();
        let (last, others) = both.split_last().map(|(last, others)| (last.0.clone(), others)).unwrap();
        for (name, _) in others {
            library.exports.insert(name.clone(), false);
        }
        let error = check(&library, Home::Both).unwrap_err().to_string();
        assert!(error.ends_with(&format!(": {last}")), "{error}");
    }
}
