//! Settings strings: `key:value` pairs separated by commas, in which our keys stand beside PyTorch's.
//!
//! PyTorch cuts such a string into *tokens*: keys, values, and each of the characters `:` `,` `[` `]`. The bridge has
//! PyTorch's own tokenizer do that. PyTorch then reads by position: a key, one token, a value (or all tokens up to a `]`),
//! one token, the next key. It checks the tokens in between only in some of its versions. `settings` reads by the same
//! positions, so it finds one of our keys exactly where PyTorch would look for a key.
//!
//! PyTorch's own keys and values are PyTorch's to check: here they are only stepped over.

use crate::error::{Error, Result};
use crate::options::Options;
use std::ops::Range;

/// One key of a settings string, and what belongs to it.
struct Setting {
    key: String,
    /// What follows the key's colon. Only read where the key is ours or `backend`.
    value: String,
    /// The tokens of the key and of its value, and the comma behind them.
    tokens: Range<usize>,
}

/// What a settings string holds for us.
#[derive(Clone, PartialEq, Debug)]
pub struct Parsed {
    /// Our options: those given, over those that held before.
    pub options: Options,
    /// The value of PyTorch's `backend` key, where it was given.
    pub backend: Option<String>,
    /// Whether any key of ours was given.
    pub has_ours: bool,
}

/// Whether a key is ours to accept or refuse: `use_uvm`, and whatever starts with `uvm_`.
pub fn is_ours(key: &str) -> bool {
    key == "use_uvm" || key.starts_with("uvm_")
}

/// Reads our keys out of the tokens of a whole settings string. The options that it does not name are those of `base`.
///
/// # Errors
/// [`Error::InvalidArgument`] for an unknown `uvm_…` key, a value that is not allowed, or a `backend` beside
/// `use_uvm:True`.
pub fn apply(base: &Options, tokens: &[String]) -> Result<Parsed> {
    let mut parsed = Parsed { options: base.clone(), backend: None, has_ours: false };
    for Setting { key, value, .. } in settings(tokens) {
        if is_ours(&key) {
            parsed.options.set(&key, &value)?;
            parsed.has_ours = true;
        } else if key == "backend" {
            parsed.backend = Some(value);
        }
    }
    match &parsed.backend {
        Some(backend) if parsed.options.enabled => Err(two_backends(backend)),
        _ => Ok(parsed),
    }
}

/// Whether a settings string asks for this allocator; `None` where it has no `use_uvm`. It never fails, so that it can
/// be asked while libraries load, where an error would end the process. [`apply`] reports whatever is wrong.
pub fn wanted(tokens: &[String]) -> Option<bool> {
    settings(tokens).filter(|setting| setting.key == "use_uvm").last().map(|setting| setting.value == "True")
}

/// Whether any key of a settings string is ours.
pub fn has_ours(tokens: &[String]) -> bool {
    settings(tokens).any(|setting| is_ours(&setting.key))
}

/// A settings string without our keys: what PyTorch's own parser may see. PyTorch reads the same tokens in it.
pub fn without_ours(tokens: &[String]) -> String {
    let mut kept = String::new();
    let mut ours_was_last = false;
    for setting in settings(tokens) {
        ours_was_last = is_ours(&setting.key);
        if !ours_was_last {
            kept.extend(tokens[setting.tokens].iter().map(String::as_str));
        }
    }
    if ours_was_last && kept.ends_with(',') {
        kept.pop(); // it led to our key
    }
    kept
}

/// PyTorch's `backend` key beside `use_uvm:True`.
pub fn two_backends(backend: &str) -> Error {
    Error::InvalidArgument(format!(
        "backend: '{backend}' is not allowed beside use_uvm:True, which chooses the backend 'uvm': leave one of them out"
    ))
}

/// The settings of a string, in its order.
fn settings(tokens: &[String]) -> impl Iterator<Item = Setting> {
    let mut next = 0;
    std::iter::from_fn(move || {
        let start = next;
        let key = without_white_space(tokens.get(start)?);
        // Ours end at the next comma, so that an error can show all that was written there.
        let end = if is_ours(&key) { next_comma(tokens, start) } else { end_by_position(tokens, start) };
        let value: String = tokens[start + 1..end].iter().map(|token| without_white_space(token)).collect();
        let value = value.strip_prefix(':').unwrap_or(&value).to_owned();
        next = (end + 1).min(tokens.len());
        Some(Setting { key, value, tokens: start..next })
    })
}

/// Where the value of PyTorch's key at `start` ends: behind one token, or behind the `]` of a list.
fn end_by_position(tokens: &[String], start: usize) -> usize {
    let value = start + 2;
    let is_list = tokens.get(value).is_some_and(|token| token == "[");
    let last =
        if is_list { tokens[value..].iter().position(|token| token == "]").map(|at| value + at) } else { Some(value) };
    last.map_or(tokens.len(), |last| (last + 1).min(tokens.len()))
}

/// The first comma from `start` on that is not inside brackets, or the end.
fn next_comma(tokens: &[String], start: usize) -> usize {
    let mut depth = 0_u32;
    let is_end = |token: &String| {
        match token.as_str() {
            "[" => depth = depth.saturating_add(1),
            "]" => depth = depth.saturating_sub(1),
            _ => {}
        }
        token == "," && depth == 0
    };
    tokens[start..].iter().position(is_end).map_or(tokens.len(), |at| start + at)
}

/// PyTorch's tokenizer has dropped white space already, except that up to 2.9 it drops blanks only. Ours may be written
/// on lines of their own under every version.
fn without_white_space(token: &str) -> String {
    token.chars().filter(|c| !matches!(c, ' ' | '\t'..='\r')).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What PyTorch's tokenizer makes of a string, since 2.10. (The product calls PyTorch's.)
    fn tokens(conf: &str) -> Vec<String> {
        let mut tokens = vec![String::new()];
        for c in conf.chars().filter(|c| !matches!(c, ' ' | '\t'..='\r')) {
            if matches!(c, ',' | ':' | '[' | ']') {
                tokens.extend([c.to_string(), String::new()]);
            } else if let Some(word) = tokens.last_mut() {
                word.push(c);
            }
        }
        tokens.retain(|token| !token.is_empty());
        tokens
    }

    fn parse(conf: &str) -> Result<Parsed> {
        apply(&Options::default(), &tokens(conf))
    }

    fn message(conf: &str) -> String {
        match parse(conf) {
            Err(Error::InvalidArgument(message)) => message,
            other => panic!("{conf}: expected an error, got {other:?}"),
        }
    }

    #[test]
    fn nothing_given_is_the_default() {
        for conf in ["", ",", "max_split_size_mb:64", "uvm:True,use_uvm2:yes"] {
            let nothing = Parsed { options: Options::default(), backend: None, has_ours: false };
            assert_eq!(parse(conf).unwrap(), nothing, "{conf}");
        }
    }

    #[test]
    fn white_space_and_order_do_not_matter() {
        for conf in [
            "use_uvm:True,uvm_prefetch:False",
            " use_ uvm : True , uvm_prefetch:False,",
            "max_split_size_mb:64,\n  use_uvm:True,\n  uvm_prefetch:False\n",
            "use_uvm:True,\tuvm_prefetch:False\r",
            "uvm_prefetch:True,use_uvm:False,roundup_power2_divisions:[256:1,>:8],use_uvm:True,uvm_prefetch:False",
        ] {
            let parsed = parse(conf).unwrap();
            assert!(parsed.has_ours && parsed.options.enabled && !parsed.options.prefetch, "{conf:?}");
        }
    }

    #[test]
    fn only_keys_are_keys() {
        assert!(!parse("roundup_power2_divisions:[256:1,use_uvm:True]").unwrap().options.enabled);
        assert!(!parse("backend:use_uvm:True").unwrap().options.enabled);
        // PyTorch refuses these at the second comma or the first word, and never comes to our key.
        assert!(!parse("max_split_size_mb:64,,use_uvm:True").unwrap().options.enabled);
        assert!(!parse("max_split_size_mb=64,use_uvm:True").unwrap().options.enabled);
    }

    #[test]
    fn what_is_wrong_with_ours_is_shown_whole() {
        for (conf, value) in [
            ("use_uvm", ""),
            ("use_uvm,max_split_size_mb:64", ""),
            ("use_uvm:", ""),
            ("use_uvm:,max_split_size_mb:64", ""),
            ("use_uvm:True:True", "True:True"),
            ("use_uvm:True;max_split_size_mb:64", "True;max_split_size_mb:64"),
            ("use_uvm:[True,False],backend:native", "[True,False]"),
        ] {
            assert_eq!(message(conf), format!("use_uvm: '{value}' is not allowed: expected True or False"));
        }
    }

    #[test]
    fn a_backend_beside_use_uvm_is_refused() {
        for conf in ["backend:cudaMallocAsync,use_uvm:True", "use_uvm:True,backend:cudaMallocAsync"] {
            assert!(message(conf).starts_with("backend: 'cudaMallocAsync' is not allowed beside use_uvm:True"));
        }
        assert!(message("use_uvm:True,backend:native").starts_with("backend: 'native' is not allowed"));
        let parsed = parse("backend:cudaMallocAsync,use_uvm:False").unwrap();
        assert_eq!(parsed.backend.as_deref(), Some("cudaMallocAsync"));
    }

    #[test]
    fn settings_made_at_run_time_keep_the_others() {
        let start = parse("use_uvm:True,uvm_oversubscription_ratio:2").unwrap().options;
        let parsed = apply(&start, &tokens("uvm_prefetch:False")).unwrap();
        assert_eq!(parsed.options, Options { prefetch: false, ..start });
    }

    #[test]
    fn pytorch_sees_only_its_own_keys() {
        for (conf, theirs) in [
            ("use_uvm:True,max_split_size_mb:64,uvm_prefetch:False", "max_split_size_mb:64"),
            ("use_uvm : True , expandable_segments:True", "expandable_segments:True"),
            ("roundup_power2_divisions:[256:1,512:2,>:4],use_uvm:True", "roundup_power2_divisions:[256:1,512:2,>:4]"),
            ("u se_uvm:True", ""),
            ("use_uvm2:True", "use_uvm2:True"),
            ("use_uvm,uvm_nonsense,", ""),
            // What PyTorch refuses, it still refuses.
            (",use_uvm:True", ",use_uvm:True"),
            ("use_uvm:True,,max_split_size_mb:64", ",max_split_size_mb:64"),
            ("max_split_size_mb:64,use_uvm:True,,", "max_split_size_mb:64,,"),
            ("", ""),
        ] {
            assert_eq!(without_ours(&tokens(conf)), theirs, "{conf}");
        }
    }

    #[test]
    fn wanted_never_fails() {
        assert_eq!(wanted(&tokens("uvm_nonsense:1, use_uvm : True")), Some(true));
        assert_eq!(wanted(&tokens("use_uvm:True,use_uvm:maybe")), Some(false));
        assert_eq!(wanted(&tokens("use_uvm")), Some(false));
        assert_eq!(wanted(&tokens("backend:native")), None);
    }

    proptest! {
        #[test]
        fn any_tokens_will_do(tokens: Vec<String>) {
            let _ = apply(&Options::default(), &tokens);
            let _ = (wanted(&tokens), has_ours(&tokens), without_ours(&tokens));
        }

        #[test]
        fn likely_strings(
            conf in "((use_uvm|uvm_[a-z_]{0,30}|backend|a):?(True|False|-?[0-9.e]{0,20}|\\[|\\])?[,: ]){0,8}"
        ) {
            let given = tokens(&conf);
            let _ = apply(&Options::default(), &given);
            let theirs = tokens(&without_ours(&given));
            prop_assert!(!has_ours(&theirs), "{theirs:?}");
            prop_assert_eq!(without_ours(&theirs), theirs.concat());
        }
    }
}
