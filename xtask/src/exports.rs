//! Whether a rebuilt library can take the official one's place: every symbol that the wheel's other libraries take from
//! the official one must be there, and no symbol that nobody knows of.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use crate::c_api;
use crate::elf::Library;

/// How many symbols of each kind an error lists.
const LISTED: usize = 20;

/// What one of the wheel's other libraries takes from elsewhere.
pub struct User {
    /// The library's name within the wheel.
    pub name: String,
    pub imports: BTreeSet<String>,
}

/// An error that names each missing symbol with the library that needs it, and each new symbol, or nothing. New are
/// allowed: the functions that Python calls (`c_api.h`), and what [`is_allowed`] says.
///
/// `standard` is the C++ standard library: the official library may carry a copy of some of its functions, for systems
/// whose own is too old to have them. Ours need not.
pub fn check(official: &Library, ours: &Library, users: &[User], standard: &Library) -> Result<()> {
    let mut problems = missing(official, ours, users, standard);
    problems.extend(
        ours.exports
            .iter()
            .filter(|(name, weak)| !official.exports.contains_key(*name) && !is_allowed(name, **weak))
            .filter(|(name, _)| !name.starts_with(c_api::PREFIX))
            .map(|(name, _)| format!("exported although the official library does not: {}", readable(name))),
    );
    if problems.is_empty() {
        return Ok(());
    }
    let more = problems.len().saturating_sub(LISTED);
    problems.truncate(LISTED);
    if more > 0 {
        problems.push(format!("and {more} more"));
    }
    bail!("the rebuilt library does not fit the wheel:\n  {}", problems.join("\n  "))
}

fn missing(official: &Library, ours: &Library, users: &[User], standard: &Library) -> Vec<String> {
    let mut problems = Vec::new();
    for user in users {
        let wanted = user.imports.iter().filter(|name| official.exports.contains_key(*name));
        for name in wanted.filter(|name| !ours.exports.contains_key(*name) && !standard.exports.contains_key(*name)) {
            problems.push(format!("missing: {}, which {} needs", readable(name), user.name));
        }
    }
    problems
}

/// Weak instances of the standard library's templates come and go with the compiler's version and inlining: whoever
/// needs one brings its own. Anything else that is new would be a leak of our own names.
fn is_allowed(name: &str, weak: bool) -> bool {
    // Functions and data of std, then type infos, vtables and guard variables of std's types.
    const STANDARD: &[&str] =
        &["_ZNSt", "_ZNKSt", "_ZSt", "_ZTISt", "_ZTSSt", "_ZTVSt", "_ZGVNSt", "_ZTIPFv", "_ZTSPFv"];
    // Type infos of std's nested types, lambdas within them included: _ZTINSt…, _ZTSNSt…
    const NESTED: &[&str] = &["_ZTINSt", "_ZTSNSt", "_ZTVNSt"];
    weak && (STANDARD.iter().chain(NESTED).any(|prefix| name.starts_with(prefix)))
}

/// A symbol's C++ name with its mangled one, by which it can be searched for.
fn readable(name: &str) -> String {
    match cpp_demangle::Symbol::new(name).ok().and_then(|symbol| symbol.demangle().ok()) {
        Some(demangled) => format!("{demangled} ({name})"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library(exports: &[(&str, bool)]) -> Library {
        Library { exports: exports.iter().map(|&(name, weak)| (name.into(), weak)).collect(), ..Library::default() }
    }

    fn user(imports: &[&str]) -> User {
        User {
            name: "torch/lib/libtorch_cuda.so".into(),
            imports: imports.iter().map(|name| name.to_string()).collect(),
        }
    }

    fn none() -> Library {
        Library::default()
    }

    const GET: &str = "_ZN3c104cuda12device_countEv";
    const SET: &str = "_ZN3c104cuda10set_deviceEa";

    #[test]
    fn same_exports_fit() {
        let library = library(&[(GET, false), (SET, false)]);
        check(&library, &library, &[user(&[GET, "malloc"])], &none()).unwrap();
    }

    #[test]
    fn missing_symbol_is_named_with_who_needs_it() {
        let error = check(&library(&[(GET, false), (SET, false)]), &library(&[(SET, false)]), &[user(&[GET])], &none());
        let error = error.unwrap_err().to_string();
        assert!(error.contains("c10::cuda::device_count()") && error.contains(GET), "{error}");
        assert!(error.contains("libtorch_cuda.so"), "{error}");
    }

    #[test]
    fn what_the_standard_library_has_may_go() {
        let (official, ours) = (library(&[(GET, false), ("_ZnwmSt11align_val_t", true)]), library(&[(GET, false)]));
        let users = [user(&[GET, "_ZnwmSt11align_val_t"])];
        assert!(check(&official, &ours, &users, &none()).is_err());
        check(&official, &ours, &users, &library(&[("_ZnwmSt11align_val_t", false)])).unwrap();
    }

    #[test]
    fn what_nobody_needs_may_go() {
        check(&library(&[(GET, false), (SET, false)]), &library(&[(SET, false)]), &[user(&[SET])], &none()).unwrap();
    }

    #[test]
    fn new_symbols_are_refused_but_for_weak_ones_of_std() {
        let official = library(&[(GET, false)]);
        check(&official, &library(&[(GET, false), ("_ZNSt6vectorIiSaIiEE9push_backEOi", true)]), &[], &none()).unwrap();
        check(&official, &library(&[(GET, false), ("torch_uvm_enabled", false)]), &[], &none()).unwrap();
        for leak in [("rust_eh_personality", false), ("_ZN9torch_uvm4initEv", true), ("_ZNSt6vectorIiE3fooEv", false)] {
            let error = check(&official, &library(&[(GET, false), leak]), &[], &none()).unwrap_err().to_string();
            assert!(error.contains(leak.0), "{error}");
        }
    }

    #[test]
    fn long_lists_are_cut() {
        let names: Vec<String> = (0..50).map(|n| format!("leak{n}")).collect();
        let exports: Vec<_> = names.iter().map(|name| (name.as_str(), false)).collect();
        let error = check(&library(&[]), &library(&exports), &[], &none()).unwrap_err().to_string();
        assert!(error.contains("and 30 more"), "{error}");
    }
}
