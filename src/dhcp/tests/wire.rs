//! Messages as bytes: where options may be, and what is no message at all.

use super::super::message::Request;
use super::*;

/// Changes a good message.
type Change = fn(&mut Vec<u8>);

#[test]
fn what_is_no_request_on_this_link_gets_silence() {
    #[rustfmt::skip]
    let rows: &[(&str, &str, Change)] = &[
        ("2131, 2", "a reply", |m| m[0] = 2),
        ("2131, 2", "operation 0", |m| m[0] = 0),
        ("2131, 2", "hardware of another kind", |m| m[1] = 6),
        ("2131, 2", "a hardware address of no length", |m| m[2] = 0),
        ("2131, 2", "a short hardware address", |m| m[2] = 5),
        ("2131, 2", "a long hardware address", |m| m[2] = 16),
        ("2131, 2", "a length beyond its field", |m| m[2] = 255),
        ("2131, 3", "another magic", |m| m[MAGIC] = 98),
        ("2131, 3", "no magic: BOOTP", |m| m[MAGIC..OPTIONS].fill(0)),
        ("1534, 2", "no message type: BOOTP with options", |m| m[OPTIONS] = code::HOSTNAME),
        ("2131, 4.1", "relayed: a bridge is one link", |m| m[GIADDR] = 10),
        ("2131, 4.1", "relayed by ourselves", |m| m[GIADDR..CHADDR].copy_from_slice(&SERVER)),
        ("2132, 9.6", "a message type without a value", |m| { m.truncate(OPTIONS); m.extend([53, 0, 255]) }),
        ("2132, 9.6", "a message type of two bytes", |m| { m.truncate(OPTIONS); m.extend([53, 2, 1, 1, 255]) }),
        ("3396, 7", "two message types", |m| { m.pop(); m.extend([53, 1, 3, 255]) }),
        ("2132, 9.1", "a short address", |m| { m.pop(); m.extend([50, 3, 10, 0, 0, 255]) }),
        ("2132, 9.1", "a long address", |m| { m.pop(); m.extend([50, 5, 10, 0, 0, 11, 0, 255]) }),
        ("2132, 9.7", "a short server id", |m| { m.pop(); m.extend([54, 1, 10, 255]) }),
        ("2132, 2", "an option without its length", |m| { m.pop(); m.push(12) }),
        ("2132, 2", "an option that leaves the message", |m| { m.pop(); m.extend([12, 9, b'a']) }),
        ("2132, 9.3", "overload of nothing", |m| { m.pop(); m.extend([52, 1, 0, 255]) }),
        ("2132, 9.3", "overload of an unknown field", |m| { m.pop(); m.extend([52, 1, 4, 255]) }),
        ("2132, 9.3", "overload without a value", |m| { m.pop(); m.extend([52, 0, 255]) }),
        ("2132, 9.3", "overload of two bytes", |m| { m.pop(); m.extend([52, 2, 1, 1, 255]) }),
        ("2131, 4.1", "an option that leaves 'file'", |m| { m.pop(); m.extend([52, 1, 1, 255]); m[FILE..FILE + 2].copy_from_slice(&[12, 127]) }),
        ("2131, 4.1", "an option that leaves 'sname'", |m| { m.pop(); m.extend([52, 1, 2, 255]); m[SNAME..SNAME + 2].copy_from_slice(&[12, 63]) }),
    ];
    assert!(answer(&discover(&[])).is_some(), "or the rows prove nothing");
    for (section, name, change) in rows {
        let mut bytes = discover(&[]);
        change(&mut bytes);
        assert_eq!(answer(&bytes), None, "RFC {section}: {name}");
    }
}

#[test]
fn what_says_nothing_of_the_client_is_passed_over() {
    #[rustfmt::skip]
    let rows: &[(&str, &str, Change)] = &[
        ("2131, 2", "hops", |m| m[3] = 16),
        ("2131, 2", "seconds", |m| m[8..10].fill(0xff)),
        ("2131, 2", "yiaddr and siaddr of a client", |m| m[YIADDR..GIADDR].fill(0xff)),
        ("2131, 2", "bytes after the hardware address", |m| m[CHADDR + 6..SNAME].fill(0xff)),
        ("2131, 2", "names in 'sname' and 'file'", |m| m[SNAME..MAGIC].fill(b'x')),
        ("2132, 2", "no end mark", |m| { m.pop(); }),
        ("2132, 3.1", "padding before and between options", |m| { m.splice(OPTIONS..OPTIONS, [0; 9]); }),
        ("2132, 3.2", "nonsense after the end", |m| m.extend([53, 200, 1])),
        ("2132, 2", "options that nobody knows", |m| { m.pop(); m.extend([254, 2, 1, 2, 200, 0, 255]) }),
        ("2132, 2", "an option of 255 bytes", |m| { m.pop(); m.extend([224, 255]); m.extend([7; 255]); m.push(255) }),
        ("2131, 4.1", "a message of 1,472 bytes", |m| m.resize(1472, 0)),
    ];
    let plain = answer(&discover(&[])).unwrap();
    for (section, name, change) in rows {
        let mut bytes = discover(&[]);
        change(&mut bytes);
        assert_eq!(answer(&bytes).as_ref(), Some(&plain), "RFC {section}: {name}");
    }
}

#[test]
fn options_go_on_in_file_and_then_in_sname() {
    let own = [&[code::REQUESTED_IP, 4][..], &OWN, &[code::END]].concat();
    let kind = [code::MESSAGE_TYPE, 1, kind::REQUEST, code::END];
    // Which fields are options; where the type is, where the address; whether it is understood.
    for (overload, type_at, address_at, well) in [
        (1, FILE, FILE + 3, true),
        (2, SNAME, SNAME + 3, true),
        (3, FILE, SNAME, true),
        (3, SNAME, FILE, true),
        (1, SNAME, FILE, false),
        (2, FILE, SNAME, false),
    ] {
        let mut bytes = bare(NONE);
        bytes.extend([code::OVERLOAD, 1, overload, code::END]);
        bytes[type_at..type_at + 4].copy_from_slice(&kind);
        bytes[address_at..address_at + 7].copy_from_slice(&own);
        let got = answer(&bytes).as_ref().map(kind_of);
        assert_eq!(got, well.then_some(kind::ACK), "{overload} {type_at} {address_at}");
    }
    // RFC 3396, section 5: the parts of one option are joined in the order options, file, sname.
    let mut bytes = message(kind::REQUEST, NONE, &[(code::OVERLOAD, &[3]), (code::REQUESTED_IP, &OWN[..1])]);
    bytes[FILE..FILE + 4].copy_from_slice(&[code::REQUESTED_IP, 1, OWN[1], code::END]);
    bytes[SNAME..SNAME + 5].copy_from_slice(&[code::REQUESTED_IP, 2, OWN[2], OWN[3], code::END]);
    assert_eq!(answer(&bytes).as_ref().map(kind_of), Some(kind::ACK));
    // An overload inside a field that is an overload already says nothing more.
    let mut bytes = discover(&[(code::OVERLOAD, &[1])]);
    bytes[FILE..FILE + 4].copy_from_slice(&[code::OVERLOAD, 1, 2, code::END]);
    bytes[SNAME..SNAME + 4].copy_from_slice(&[code::MESSAGE_TYPE, 1, 9, code::END]);
    assert_eq!(answer(&bytes).as_ref().map(kind_of), Some(kind::OFFER));
}

#[test]
fn a_message_cut_anywhere_is_survived_and_before_its_options_is_none() {
    let whole = message(kind::REQUEST, NONE, &[(50, &OWN), (54, &SERVER), (55, &[1, 3, 6]), (57, &[2, 64])]);
    for length in 0..whole.len() {
        let request = Request::parse(&whole[..length]);
        assert!(request.is_none() || length >= OPTIONS, "{length}");
        // A whole option or none: the value of one is never a part of what was sent.
        for (code, sent) in [(50, &OWN[..]), (54, &SERVER), (55, &[1, 3, 6]), (57, &[2, 64])] {
            let read = request.as_ref().and_then(|request| request.option(code));
            assert!(read.is_none_or(|read| read == sent), "{length}: option {code}");
        }
    }
}

#[test]
fn damaged_messages_never_panic_and_answers_keep_their_size() {
    let whole = message(kind::REQUEST, NONE, &[(50, &OWN), (54, &SERVER), (55, &[1, 3, 6]), (57, &[2, 64])]);
    let (mut engine, mut seed) = (engine(), 0x9e37_79b9_7f4a_7c15_u64);
    for _ in 0..50_000 {
        let mut bytes = whole.clone();
        for _ in 0..4 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let at = (seed >> 8) as usize % bytes.len();
            bytes[at] = seed as u8;
        }
        bytes.truncate(bytes.len() - (seed >> 40) as usize % 24);
        if let Some(reply) = ask(&mut engine, &bytes) {
            assert!((300..=1472).contains(&reply.payload.len()));
        }
    }
    assert!(engine.leases(Instant::now()).len() <= 1);
}
