//! What a registry says of how long to wait: `Retry-After` (RFC 9110 section 10.2.3) and docker's `ratelimit-*`.

use std::time::{Duration, SystemTime};

use ureq::http::HeaderMap;

use super::http::text_header;

/// How long the registry wants to be left alone; zero for a time that has passed.
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = text_header(headers, "retry-after")?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let time = httpdate::parse_http_date(text).ok()?;
    Some(time.duration_since(now).unwrap_or_default())
}

/// `it allows 100 pulls in 6 h and 0 are left`, of headers such as `ratelimit-limit: 100;w=21600`; empty without them.
pub(crate) fn rate_limit(headers: &HeaderMap) -> String {
    let number = |name: &str| {
        let text = text_header(headers, name)?;
        let (count, window) = text.split_once(";w=").map_or((text, None), |(count, window)| (count, Some(window)));
        Some((count.trim().parse::<u64>().ok()?, window.and_then(|window| window.trim().parse::<u64>().ok())))
    };
    let Some((limit, window)) = number("ratelimit-limit") else { return String::new() };
    let window = window.map_or(String::new(), |seconds| format!(" in {}", show(seconds)));
    let left = number("ratelimit-remaining").map_or(String::new(), |(left, _)| format!(" and {left} are left"));
    format!("it allows {limit} pulls{window}{left}")
}

/// A time for people.
pub(crate) fn show(seconds: u64) -> String {
    match seconds {
        0 => "0 s".into(),
        _ if seconds.is_multiple_of(3600) => format!("{} h", seconds / 3600),
        _ if seconds.is_multiple_of(60) => format!("{} min", seconds / 60),
        _ => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(list: &[(&'static str, &str)]) -> HeaderMap {
        list.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    #[test]
    fn a_wait_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        for (value, seconds) in [
            ("7", Some(7)),
            (" 0 ", Some(0)),
            ("Sun, 06 Nov 1994 08:50:37 GMT", Some(60)),
            ("Sunday, 06-Nov-94 08:49:47 GMT", Some(10)),
            ("Sun Nov  6 08:49:39 1994", Some(2)),
            ("Sun, 06 Nov 1994 08:00:00 GMT", Some(0)),
            ("-1", None),
            ("soon", None),
            ("99999999999999999999999", None),
            ("Sun, 99 Nov 1994 08:49:37 GMT", None),
        ] {
            let wait = retry_after(&headers(&[("retry-after", value)]), now);
            assert_eq!(wait, seconds.map(Duration::from_secs), "{value}");
        }
        assert_eq!(retry_after(&HeaderMap::new(), now), None);
    }

    #[test]
    fn dockers_limits_are_read() {
        let said = |list: &[(&'static str, &str)]| rate_limit(&headers(list));
        let both = [("ratelimit-limit", "100;w=21600"), ("ratelimit-remaining", "0;w=21600")];
        assert_eq!(said(&both), "it allows 100 pulls in 6 h and 0 are left");
        assert_eq!(said(&[("ratelimit-limit", "10;w=90")]), "it allows 10 pulls in 90 s");
        assert_eq!(said(&[("ratelimit-limit", "10")]), "it allows 10 pulls");
        for nonsense in ["", ";w=5", "x;w=5", "-1"] {
            assert_eq!(said(&[("ratelimit-limit", nonsense)]), "", "{nonsense}");
        }
    }
}
