local Orders = {}
Orders.__index = Orders

function Orders.new()
  return setmetatable({}, Orders)
end

function Orders:order(article, count)
  local fine, left = pcall(luacell.call, "host.stock@1", "take", article, count)
  if not fine then
    luacell.log("warning", "no order: " .. left.message)
    return "refused (" .. left.code .. "): " .. left.message
  end
  return count .. " of " .. article .. ", " .. left .. " left"
end

return Orders
